"""Positions come back from manifests, those of older checkpoints too."""

import json
from pathlib import Path

from ijepa_scale.data.streams.positions import SourcePosition, StreamPosition, saved_positions

FIXTURES = Path(__file__).parents[2] / "fixtures"


def test_a_position_comes_back_from_a_manifest():
    positions = [[StreamPosition(7, (SourcePosition(1, 2, 3, 4, 5, 6, 7), SourcePosition())), None], [None, None]]
    saved = [[position and position.to_json() for position in streams] for streams in positions]
    assert saved_positions(json.loads(json.dumps({"stream_positions": saved}))) == positions
    assert saved_positions({}) == []


def test_an_older_checkpoint_tells_positions_in_other_words():
    manifest = FIXTURES / "before_rooms/stream/checkpoints/step-00000004/manifest.json"
    position = StreamPosition(16, (SourcePosition(1, 0, rows=4, byte=4608, block=1, done=4, images=8),))
    assert saved_positions(json.loads(manifest.read_text())) == [[position], [position]]
