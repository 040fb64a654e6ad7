"""Batches of labelled images: the same on any number of ranks and workers; what is mixed, substituted, left out."""

import dataclasses
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.order import image_at
from ijepa_scale.evals.batches import Augment, LabelledBatch, Mix, TrainingBatches, _rand_augment
from tests.evals.labelled import labelled, write_colours

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    write_colours(root, "train", 26)
    return root


def batches_of(images, **changes) -> TrainingBatches:
    settings = {
        "augment": Augment(rand_augment=RAND_AUGMENT),
        "mix": Mix(),
        "epochs": 2,
        "batch_size": 11,
        "micro_batch_size": 4,
        "image_size": 16,
        "seed": 3,
    }
    return TrainingBatches(labelled=images, **{**settings, **changes})


def made_by(batches: TrainingBatches) -> list[LabelledBatch]:
    with batches.stream(workers=0) as stream:
        return list(stream)


def whole_steps(made: list[list[LabelledBatch]]) -> list[tuple[torch.Tensor, ...]]:
    """Images, labels, targets of each step, put together by position from all ranks' micro-batches."""
    steps = {}
    for batch in (batch for rank in made for batch in rank):
        steps.setdefault(batch.step, []).append(batch)
    whole = []
    for step in sorted(steps):
        at = torch.cat([batch.positions for batch in steps[step]])
        assert sorted(at.tolist()) == list(range(len(at))), "each position once"
        parts = ("images", "labels", "targets")
        whole.append(tuple(torch.cat([getattr(b, part) for b in steps[step]])[at.argsort()] for part in parts))
    return whole


def same(a: list[tuple[torch.Tensor, ...]], b: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for u, v in zip(a, b, strict=True) for x, y in zip(u, v, strict=True)
    )


@pytest.mark.parametrize("crop", ["random", "stretched", "centre"])
def test_batches_are_the_same_bits_on_any_number_of_ranks(colours, crop):
    images, made = labelled(colours), {}
    for ranks, micro in ((1, 100), (1, 2), (2, 4), (3, 4)):
        shares = [
            batches_of(
                images,
                augment=Augment(crop=crop, rand_augment=RAND_AUGMENT),
                rank=r,
                ranks=ranks,
                micro_batch_size=micro,
            )
            for r in range(ranks)
        ]
        steps = [made_by(share) for share in shares]
        assert len({len(rank) for rank in steps}) == 1, "ranks have as many micro-steps"
        assert all(len(batch.images) for rank in steps for batch in rank)
        made[ranks, micro] = whole_steps(steps)
    assert len(made[1, 100]) == 2 * (26 // 11) and all(len(step[0]) == 11 for step in made[1, 100])
    assert all(same(made[1, 100], other) for other in made.values())
    first, second = made[1, 100][0][0], made[1, 100][1][0]
    assert not torch.equal(first, second)


def test_loader_processes_change_nothing(colours):
    batches = batches_of(labelled(colours), epochs=1)
    with batches.stream(workers=1) as stream:
        loaded = list(stream)
    assert same(whole_steps([loaded]), whole_steps([made_by(batches)]))
    assert [(batch.step, batch.last) for batch in loaded] == [(s, m == 2) for s in range(2) for m in range(3)]


def test_randaugment_is_that_of_the_papers_without_its_errors(colours):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    augment = _rand_augment(RAND_AUGMENT, 16)
    assert len(augment.ops) == 15 and augment.num_layers == 2
    for op in augment.ops:
        op.aug_fn(image, *(op.level_fn(10, op.hparams) if op.level_fn else ()), **op.kwargs)  # its highest magnitude


def test_nobody_elses_random_numbers_are_used_up(colours):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    made_by(batches_of(labelled(colours), epochs=1))
    assert before[0] == random.getstate() and before[1] == np.random.get_state()[1].tolist()
    assert torch.equal(before[2], torch.get_rng_state())


def test_labels_are_those_of_the_images_and_of_a_subset_only(colours):
    some = labelled(colours).take(np.array([20, 3, 9, 14, 2, 25]))
    batches = batches_of(some, mix=None, augment=Augment(crop="centre", flip=False), batch_size=100, epochs=1)
    assert (batches.global_batch_size, batches.total_steps) == (6, 1)
    for batch in made_by(batches):
        for row, position in enumerate(batch.positions.tolist()):
            place = image_at(3, 0, position, num_images=6, global_batch_size=6)
            pixels = np.asarray(some.images.read(int(some.indices[place])))
            assert batch.labels[row] == some.labels[place]
            assert np.abs(batch.images[row].numpy().mean((1, 2)) - pixels.mean((0, 1))).max() < 4


def test_mixed_pairs_are_a_naive_sum_and_targets_sum_to_one(colours):
    images = labelled(colours)
    plain = {"augment": Augment(crop="centre", flip=True), "micro_batch_size": 100}
    whole = whole_steps([made_by(batches_of(images, **plain))])
    bare = made_by(batches_of(images, mix=None, **plain))
    kinds = set()
    for (mixed, labels, targets), unmixed in zip(whole, bare, strict=True):
        assert torch.equal(labels, unmixed.labels)
        torch.testing.assert_close(targets.sum(1), torch.ones(11))
        hot = torch.nn.functional.one_hot(labels, 4).float()
        assert torch.equal(mixed[10], unmixed.images[10]) and torch.equal(targets[10], hot[10]), "the one left over"
        for i in range(0, 10, 2):
            own, other = unmixed.images[i].float(), unmixed.images[i + 1].float()
            # the images' share of the first, told from the pixels alone
            differ = own != other
            share = ((mixed[i].float() - other)[differ] / (own - other)[differ]).mean().item()
            assert (targets[i] + targets[i + 1]).tolist() == pytest.approx((hot[i] + hot[i + 1]).tolist(), abs=1e-6)
            if labels[i] == labels[i + 1]:
                continue
            weight = targets[i, labels[i]].item()
            pasted = (mixed[i].float() == other) & differ
            if torch.equal(mixed[i].float(), torch.where(pasted, other, own)):  # CutMix
                kinds.add("cutmix")
                assert weight == pytest.approx(1 - pasted.any(0).float().mean().item(), abs=0.02)
                assert torch.equal(mixed[i + 1].float(), torch.where(pasted.any(0), own, other))
            else:
                kinds.add("mixup")
                assert weight == pytest.approx(share, abs=0.01)
                expected = [weight * own + (1 - weight) * other, weight * other + (1 - weight) * own]
                assert (mixed[i : i + 2].float() - torch.stack(expected)).abs().max() <= 0.5 + 1e-3
    assert kinds == {"cutmix", "mixup"}


def test_an_unreadable_image_gives_its_place_to_another_with_that_ones_label(colours, tmp_path):
    shutil.copytree(colours, tmp_path / "data")
    images = labelled(tmp_path / "data")
    bad = 5
    with open(images.images.sample_id(bad), "wb") as file:
        file.write(b"no image")
    settings = {"mix": None, "augment": Augment(crop="centre", flip=False), "batch_size": 26, "epochs": 1}
    runs = [made_by(batches_of(images, **settings, ranks=2, rank=r)) for r in (0, 1)]
    met = [entry for rank in runs for batch in rank for entry in batch.bad]
    assert [entry.index for entry in met] == [bad] and "cannot" not in met[0].sample_id
    colour = {
        c: np.asarray(images.images.read(int(np.flatnonzero(images.labels == c)[0]))).mean((0, 1)) for c in range(4)
    }
    for batch in (batch for rank in runs for batch in rank):
        for pixels, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
            nearest = min(colour, key=lambda c: np.abs(pixels.mean((1, 2)) - colour[c]).sum())
            assert nearest == label
    only_bad = images.take(np.array([bad, bad]))
    with pytest.raises(BadImageError, match="random labelled images"):
        made_by(batches_of(only_bad, **{**settings, "batch_size": 2}))


def test_what_cannot_be_is_said(colours):
    images = labelled(colours)
    with pytest.raises(ValueError, match="crop must be random"):
        Augment(crop="middle")
    with pytest.raises(ValueError, match="scale must satisfy"):
        Augment(scale=(0.0, 1.0))
    with pytest.raises(ValueError, match="one of them above"):
        Mix(mixup=0.0, cutmix=0.0)
    with pytest.raises(ValueError, match="use at most 6 ranks, or a larger batch"):
        batches_of(images, ranks=7)
    with pytest.raises(ValueError, match="no labelled images"):
        batches_of(dataclasses.replace(images, indices=np.array([], np.int64), labels=np.array([], np.int64)))
