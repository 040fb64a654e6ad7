"""A rank's share of images, and loader processes that cannot hand over what they read."""

import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_scale.data.collate import LoadError
from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.engine.distributed import Ranks, alone
from ijepa_scale.evals import shares
from ijepa_scale.evals.batches import Augment, TrainingBatches
from ijepa_scale.evals.extract import extract
from ijepa_scale.evals.shares import image_batches
from tests.evals.labelled import labelled, write_colours
from tests.evals.test_extract import Patches

PLAIN = {"image_size": 16, "batch_size": 4}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    write_colours(root, "train", 26)
    return root


@pytest.mark.parametrize("stretch", [False, True])
@pytest.mark.parametrize("start, sizes", [(0, [4, 4, 1]), (6, [4, 3])])
def test_images_come_once_in_order_and_black_ones_are_no_images(colours, tmp_path, stretch, start, sizes):
    shutil.copytree(colours, tmp_path / "data")
    images = labelled(tmp_path / "data").images
    with open(images.sample_id(7), "wb") as file:
        file.write(b"no image")
    seen, reasons = {}, []
    for rank in range(3):
        here = Ranks(rank, 3, rank, torch.device("cpu"))
        given = {**PLAIN, "ranks": here, "stretch": stretch, "start": start}
        with image_batches(images, range(26), workers=rank, **given) as loaded:
            batches = list(loaded)
        assert [len(batch.images) for batch in batches] == sizes
        for batch in batches:
            for pixels, place, reason in zip(batch.images, batch.places.tolist(), batch.reasons, strict=True):
                reasons += [reason] * bool(reason)
                assert place >= 0 or not pixels.any()
                if place >= 0:
                    assert place not in seen and place % 3 == (rank + start) % 3
                    seen[place] = pixels
    assert sorted(seen) == [place for place in range(start, 26) if place != 7]
    assert len(reasons) == 1 and "no image of a known format" in reasons[0]
    if stretch:
        expected = np.asarray(images.read(11).resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert np.abs(seen[11].numpy().astype(int) - expected).max() <= 2
    with pytest.raises(BadImageError):
        images.read(7)


def unshared(storage):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def killed(image, size):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how, words", [("full", "is full; start the container with a larger"), ("killed", "killed")])
def test_loader_processes_that_fail_end_an_extraction_with_a_word(colours, monkeypatch, how, words):
    """Of a batch that cannot be sent torch's queue only prints, and waits for it for ever."""
    if how == "full":
        monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", unshared)
        monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", unshared)
    else:
        monkeypatch.setattr(shares, "center_crop", killed)
    images = labelled(colours).images
    with pytest.raises(LoadError, match=rf"{words}.*, or lower --workers \(now 2; with 0 "):
        extract({"encoder": Patches()}, images, workers=2, **PLAIN)
    assert not multiprocessing.active_children()
    if how == "full":
        assert len(extract({"encoder": Patches()}, images, workers=0, **PLAIN).indices) == 26


@pytest.mark.parametrize("task", ["encoding", "training"])
def test_batches_that_do_not_fit_into_shared_memory_are_refused(colours, monkeypatch, task):
    images, free = labelled(colours), 16 * 16 * 3 * 4 * 3
    settings = {"augment": Augment(), "epochs": 1, "batch_size": 8, "micro_batch_size": 4, "image_size": 16, "seed": 0}

    def load(workers):
        if task == "encoding":
            return image_batches(images.images, range(26), ranks=alone(), workers=workers, **PLAIN)
        return TrainingBatches(labelled=images, **settings).stream(workers=workers)

    monkeypatch.setattr(shares, "shared_memory", lambda: ("here", free))
    with pytest.raises(ValueError, match=r"has 0 MiB free.* --workers \d \+ 1\).* or set --workers="), load(2):
        pass
    with load(0) as batches:
        assert len(list(batches)) == (7 if task == "encoding" else 6)
