"""Runs on two ranks that train on a folder and a tar at 1 to 3, read by index and streamed."""

import pytest

from tests.conftest import SMALL_CONFIG
from tests.data.small_sources import write_noise_tar
from tests.end_to_end import worker_streams
from tests.end_to_end.runs import Runs, assert_same_run

STEPS, IMAGES = 12, 96


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sources_come_as_often_as_their_weights_say_and_resume_exactly(
    image_folder, tmp_path_factory, tmp_path, streaming
):
    tar = write_noise_tar(tmp_path / "noise.tar", range(20))
    config = tmp_path / "small.yaml"
    config.write_text(SMALL_CONFIG % f"[{{path: {image_folder}}}, {{path: {tar}, weight: 3}}]")
    runs = Runs(config, tmp_path / "output")
    options = (f"data.streaming={streaming}", "data.shuffle_buffer=4", f"data.cache_dir={tmp_path / 'cache'}")

    whole = tmp_path / "whole"
    runs(whole, *options, target=worker_streams.record_names)
    names = [name for file in whole.glob("names-*.txt") for line in file.open() for name in line.split()[1:]]
    from_tar = [name for name in names if "class-" not in name]
    assert len(names) == IMAGES and len(from_tar) == 3 * IMAGES // 4
    assert {names.count(name) for name in set(names) - set(from_tar)} == {1}  # 24 of 64
    assert {from_tar.count(name) for name in set(from_tar)} <= {3, 4}  # 72 of 20: three passes and part of a fourth

    parts = tmp_path / "parts"
    runs(parts, *options, "optimization.stop_at_step=5", target=worker_streams.record_names)
    runs(parts, *options, target=worker_streams.record_names)
    assert_same_run(parts, whole, STEPS)
    for file in whole.glob("names-*.txt"):
        assert (parts / file.name).read_text() == file.read_text()
