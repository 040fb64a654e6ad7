"""Micro-batches are pure functions of their position: ranks, accumulation and workers change nothing."""

import gc
import re
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_scale.data import collate
from ijepa_scale.data.collate import MicroBatches, check_batches_fit, micro_batch_stream
from ijepa_scale.data.images import open_images
from ijepa_scale.data.order import CROP, generator_for, image_at
from ijepa_scale.data.transforms import random_resized_crop
from ijepa_scale.engine.feed import collecting_by_hand
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.multiblock import MultiBlock
from ijepa_scale.objectives.masks import BlockMasks

BLOCKS = MultiBlock(grid=PatchGrid(4, 4), min_keep=2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(21):
        pixels = rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return open_images(str(folder))


def micro_batches(images, **changes):
    values = dict(
        images=images,
        draw_masks=BlockMasks(BLOCKS, seed=3),
        seed=3,
        image_size=32,
        crop_scale=(0.3, 1.0),
        global_batch_size=8,
        micro_batch_size=8,
    )
    return MicroBatches(**{**values, **changes})


def sequences(packed):
    bounds = packed.cu_seqlens.tolist()
    return [packed.indices_T[low:high] for low, high in pairwise(bounds)]


@pytest.mark.parametrize("context", ["all", "3"])
def test_any_cut_of_the_global_batch_holds_the_same_images_crops_and_masks(images, context):
    draw = BlockMasks(BLOCKS, context, seed=3)
    whole = micro_batches(images, draw_masks=draw)
    for step in (0, 1, 5):
        expected = whole[step]
        for ranks, micro in ((2, 4), (2, 2), (4, 1), (1, 2)):
            parts = []
            accumulation = 8 // (ranks * micro)
            for a in range(accumulation):
                for rank in range(ranks):
                    cut = micro_batches(images, draw_masks=draw, micro_batch_size=micro, rank=rank, ranks=ranks)
                    assert cut.accumulation_steps == accumulation
                    parts.append(cut[step * accumulation + a])
            assert sum((part.indices for part in parts), ()) == expected.indices
            assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
            for name in ("context", "target_blocks"):
                got = [s % 16 for part in parts for s in sequences(getattr(part.masks, name))]
                want = [s % 16 for s in sequences(getattr(expected.masks, name))]
                assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_batch_is_what_the_position_says(images):
    batch = micro_batches(images, draw_masks=lambda step, positions: (step, positions))[4]
    assert batch.masks == (4, range(8))
    for position in range(8):
        index = image_at(3, 4, position, num_images=21, global_batch_size=8)
        crop = random_resized_crop(images.read(index), generator_for(3, CROP, 4, position), 32, scale=(0.3, 1.0))
        assert batch.indices[position] == index
        assert np.array_equal(batch.images[position].numpy(), crop)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_restarts_change_nothing(images, workers):
    dataset = micro_batches(images, micro_batch_size=4)
    alone = list(micro_batch_stream(dataset, start_step=0, stop_step=3, workers=0))
    shared = list(micro_batch_stream(dataset, start_step=1, stop_step=3, workers=workers))
    assert len(alone) == 6 and len(shared) == 4
    for a, b in zip(alone[2:], shared, strict=True):
        assert a.indices == b.indices
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.masks.prediction.indices_T, b.masks.prediction.indices_T)


class Collecting(MicroBatches):
    def __getitem__(self, micro_step):
        return gc.isenabled()


def test_workers_collect_garbage_although_the_rank_does_not(images):
    dataset = Collecting(**vars(micro_batches(images)))
    with collecting_by_hand():
        assert list(micro_batch_stream(dataset, start_step=0, stop_step=2, workers=1)) == [True, True]
        assert list(micro_batch_stream(dataset, start_step=0, stop_step=1, workers=0)) == [False]


def test_an_unreadable_image_is_reported_and_replaced(images, tmp_path):
    for i in range(12):
        Image.fromarray(np.full((40, 40, 3), 20 * i, np.uint8)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "05.png").write_bytes(b"not an image")
    dataset = micro_batches(open_images(str(tmp_path)), global_batch_size=12, micro_batch_size=12)
    batch = dataset[0]
    assert [bad.index for bad in batch.bad] == [5]
    again = dataset[0]
    assert torch.equal(batch.images, again.images)
    place = batch.indices.index(5)
    assert batch.images[place].float().std() == 0 and batch.images[place].unique().numel() == 1


def test_the_number_of_workers_that_shared_memory_is_said_to_hold_is_the_largest():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        size, workers, ranks, free = (
            int(rng.integers(low, high)) for low, high in ((1, 99), (1, 9), (1, 4), (1, 9999))
        )
        facts = {"batch_bytes": size << 20, "ranks": ranks, "free": free << 20}
        fits = size * ranks * (collate.PREFETCH * workers + 1) <= free
        try:
            check_batches_fit(workers=workers, **facts)
            assert fits
        except ValueError as error:
            assert not fits and f"{collate.SHARED_MEMORY} has {free:,} MiB free" in str(error)
            most = int(re.search(r"--shm-size=\d+g .* set data.workers=(\d+)", str(error))[1])
            assert most < workers
            if most:
                check_batches_fit(workers=most, **facts)
            with pytest.raises(ValueError, match=f"data.workers={most}"):
                check_batches_fit(workers=most + 1, **facts)


def test_a_loader_that_cannot_start_leaves_no_process(images, monkeypatch):
    """Of two processes the second meets the limit of open files; the error that is kept holds on to the first."""
    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(iterator, "__del__", lambda half_made: None)  # which fails, and Python prints that
    started, process = [], collate.multiprocessing.Process
    start = process.start

    def failing(self):
        if started:
            raise OSError(24, "Too many open files")
        start(self)
        started.append(self)

    monkeypatch.setattr(process, "start", failing)
    with pytest.raises(OSError, match="Too many") as error:
        micro_batch_stream(micro_batches(images), start_step=0, stop_step=9, workers=2)
    assert len(started) == 1 and not collate.multiprocessing.active_children()
    del error
    gc.collect()


def test_processes_that_do_not_end_by_themselves_are_killed(images, monkeypatch):
    monkeypatch.setattr(collate, "CLOSE_SECONDS", 0.2)
    with micro_batch_stream(Stuck(**vars(micro_batches(images))), start_step=0, stop_step=9, workers=2):
        assert len(collate.multiprocessing.active_children()) == 2
        time.sleep(0.3)
        before = time.monotonic()
    assert time.monotonic() - before < 3 and not collate.multiprocessing.active_children()


class Stuck(MicroBatches):
    def __getitem__(self, micro_step):
        time.sleep(60)
