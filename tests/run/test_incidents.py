from types import SimpleNamespace

import pytest

from ijepa_scale.data.streams.dealing import Streams
from ijepa_scale.data.streams.shard_stream import Shards
from ijepa_scale.run.incidents import images_met


@pytest.mark.parametrize("step, known, met", [(0, 0, 1000), (99, 0, 1600), (0, 500, 500), (99, 1200, 1200)])
def test_a_few_bad_images_at_the_start_of_a_stream_are_few_of_what_is_to_come(step, known, met):
    streams = Streams(sources=(Shards("x:train", ["x.tar"], num_images=known),), seed=0, shuffle_buffer=1)
    config = SimpleNamespace(optimization=SimpleNamespace(global_batch_size=16))
    assert images_met(SimpleNamespace(images=streams, config=config), step) == met
    assert images_met(SimpleNamespace(images=range(40), config=config), step) == 40
