import itertools
import shutil

import numpy as np
import pytest
import torch

from ijepa_scale.data.images import open_images
from ijepa_scale.data.transforms import center_crop, stretched
from ijepa_scale.evals import features
from ijepa_scale.evals.features import features_of, last_blocks
from ijepa_scale.evals.labels import labelled_pair
from ijepa_scale.models.vit import VisionTransformer, ViTSize
from tests.evals.labelled import write_colours
from tests.evals.small import SIDE, evaluation_of, small_encoder, splits_of_folder, write_splits
from tests.evals.worker_features import compute, killed
from tests.models.test_vit import hugging_face_twin, imagenet_normalized
from tests.processes import assert_all, run_ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("images"))


class Calls:
    """How many images an encoder has encoded."""

    def __init__(self, encoder):
        self.images = 0
        encoder.patch_embed.register_forward_hook(self._count)

    def _count(self, _, given, __):
        self.images += len(given[0])

    def of(self, call):
        """What call() returns, and how many images it encoded."""
        self.images = 0
        return call(), self.images


def counted(root, tmp_path, **changed):
    evaluation = evaluation_of(root, keep=tmp_path / "keep", **changed)
    return evaluation, Calls(evaluation.encoder)


@torch.no_grad()
def by_hooks(encoder, pixels, folder):
    """The average over the patches of each of the last four layers of transformers.IJepaModel, side by side."""
    twin, outputs = hugging_face_twin(encoder, folder), []
    for layer in twin.layers[-4:]:
        layer.register_forward_hook(lambda _, __, out: outputs.append(out))
    twin(pixel_values=imagenet_normalized(pixels).float())
    return torch.cat([twin.layernorm(out).mean(dim=1) for out in outputs], dim=1).numpy()


@pytest.mark.parametrize("stretch, crop", [(False, center_crop), (True, stretched)])
def test_they_are_those_of_hooks_on_the_last_four_layers_of_transformers(root, tmp_path, stretch, crop):
    evaluation, _ = counted(root, tmp_path)
    found = features_of(evaluation, evaluation.test, stretch=stretch)
    images = evaluation.test.images
    pixels = torch.from_numpy(np.stack([crop(images.read(index), SIDE) for index in range(24)]))
    expected = by_hooks(evaluation.encoder, pixels, tmp_path / "twin")
    assert found.blocks.shape == (24, 4 * 32) and found.blocks.dtype == np.float32 and found.width == 32
    np.testing.assert_allclose(found.blocks, expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(found.last, found.blocks[:, 96:])
    parts = np.split(expected, 4, axis=1)
    assert min(np.abs(a - b).max() for a, b in itertools.pairwise(parts)) > 0.1  # each is another
    features, labels = found.tensors()
    assert np.array_equal(features, found.last) and np.array_equal(labels, evaluation.test.labels)


def test_a_second_call_encodes_nothing_and_gives_the_same_bits(root, tmp_path):
    evaluation, calls = counted(root, tmp_path)
    first, encoded = calls.of(lambda: features_of(evaluation, evaluation.train))
    assert encoded == 40
    again, encoded = calls.of(lambda: features_of(evaluation, evaluation.train))
    assert encoded == 0 and isinstance(again.blocks, np.memmap)
    assert all(np.array_equal(getattr(again, name), getattr(first, name)) for name in ("blocks", "labels", "indices"))
    fresh, calls = counted(root, tmp_path)  # another process's evaluation: the files are all that it needs
    again, encoded = calls.of(lambda: features_of(fresh, fresh.train))
    assert encoded == 0 and np.array_equal(again.blocks, first.blocks)
    with pytest.raises(ValueError, match="read-only"):
        again.blocks[0, 0] = 0.0


def test_what_is_kept_of_more_images_serves_for_fewer_in_any_order(root, tmp_path):
    evaluation, calls = counted(root, tmp_path)
    some, encoded = calls.of(lambda: features_of(evaluation, evaluation.train.take(np.array([9, 2]))))
    assert encoded == 2  # and does not serve for more:
    whole, encoded = calls.of(lambda: features_of(evaluation, evaluation.train))
    assert encoded == 40
    places = np.array([31, 9, 2, 17])
    part, encoded = calls.of(lambda: features_of(evaluation, evaluation.train.take(places)))
    assert encoded == 0 and part.indices.tolist() == places.tolist()
    assert np.array_equal(part.blocks, whole.blocks[places]) and np.array_equal(part.labels, whole.labels[places])
    np.testing.assert_allclose(some.blocks, whole.blocks[[9, 2]], rtol=1e-4, atol=1e-5)


def test_neither_other_weights_nor_another_preprocessing_or_data_are_served(root, tmp_path):
    evaluation, calls = counted(root, tmp_path)
    first = features_of(evaluation, evaluation.train)
    others = {"weights": {"encoder": small_encoder(1), "sha256": "1" * 64}, "size": {"image_size": 12}}
    for changed in others.values():
        other, calls_of_other = counted(root, tmp_path, **changed)
        found, encoded = calls_of_other.of(lambda other=other: features_of(other, other.train))
        assert encoded == 40 and np.abs(found.blocks - first.blocks).max() > 0.01
    found, encoded = calls.of(lambda: features_of(evaluation, evaluation.train, stretch=True))
    assert encoded == 40 and np.abs(found.blocks - first.blocks).max() > 0.01
    copied = shutil.copytree(root, tmp_path / "copy")
    for encodes in (40, 0):
        other, calls_of_other = counted(copied, tmp_path)
        assert calls_of_other.of(lambda other=other: features_of(other, other.train))[1] == encodes
    shutil.copy(copied / "train/class-1/001.png", copied / "train/class-0/000.png")  # one image is another
    other, calls_of_other = counted(copied, tmp_path)
    found, encoded = calls_of_other.of(lambda: features_of(other, other.train))
    assert encoded == 40 and not np.array_equal(found.blocks[0], first.blocks[0])
    _, encoded = calls.of(lambda: features_of(evaluation, evaluation.train))
    assert encoded == 0  # that one is still there


def test_images_that_cannot_be_read_are_left_out_with_their_labels(tmp_path, caplog):
    write_splits(tmp_path)
    bad = tmp_path / "train" / "class-2" / "006.png"
    bad.write_bytes(b"no image")
    evaluation, calls = counted(tmp_path, tmp_path)
    index = next(i for i in range(40) if evaluation.train.images.sample_id(i).endswith("class-2/006.png"))
    for _ in range(2):
        found = features_of(evaluation, evaluation.train)
        assert found.indices.tolist() == [i for i in range(40) if i != index] and len(found.blocks) == 39
        assert np.array_equal(found.labels, np.delete(evaluation.train.labels, index))
    (said,) = [record.getMessage() for record in caplog.records]
    assert ":train: 1 of 40 images cannot be read and are left out, the first, " in said
    assert "class-2/006.png, because: " in said
    found, encoded = calls.of(lambda: features_of(evaluation, evaluation.train.take(np.array([index, 3, 39]))))
    assert encoded == 0 and found.indices.tolist() == [3, 39] and found.labels.tolist() == [0, 3]
    assert np.array_equal(found.blocks, features_of(evaluation, evaluation.train).blocks[[3, 38]])


@pytest.mark.parametrize("depth", [1, 3, 4, 7])
def test_networks_of_fewer_blocks_have_all_of_them(depth, root, tmp_path):
    encoder = VisionTransformer(
        ViTSize(width=8, depth=depth, heads=2, mlp_width=8), image_size=SIDE, patch_size=8
    ).requires_grad_(False)
    assert last_blocks(encoder) == tuple(range(depth))[-4:]
    evaluation, _ = counted(root, tmp_path, encoder=encoder)
    found = features_of(evaluation, evaluation.test)
    assert found.blocks.shape == (24, 8 * min(depth, 4)) and found.last.shape == (24, 8)


@pytest.mark.slow  # a stopped extraction that goes on is asked of embed, too
def test_an_extraction_that_is_killed_leaves_nothing_that_is_served(root, tmp_path):
    ended = run_ranks(killed, 1, tmp_path / "output", str(root), str(tmp_path / "keep"))
    assert [end.code for end in ended] == [-9]
    assert list((tmp_path / "keep").rglob("*.npy*")) and not list((tmp_path / "keep").rglob("facts.json"))
    evaluation, calls = counted(root, tmp_path)
    found, encoded = calls.of(lambda: features_of(evaluation, evaluation.train))
    assert encoded == 40 and len(found.blocks) == 40
    whole = evaluation_of(root, keep=tmp_path / "other")
    assert np.array_equal(found.blocks, features_of(whole, whole.train).blocks)
    for folder in (tmp_path / "keep", tmp_path / "other"):
        kept = next(folder.rglob("facts.json")).parent
        assert sorted(path.name for path in kept.iterdir()) == ["facts.json", "features.npy", "indices.npy"]


def test_an_extraction_that_fails_at_its_very_end_is_gone_on_with(root, tmp_path, monkeypatch):
    evaluation, calls = counted(root, tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(features, "write_whole", full)
        with pytest.raises(OSError, match="No space"):
            features_of(evaluation, evaluation.train)
    found, encoded = calls.of(lambda: features_of(evaluation, evaluation.train))
    whole = evaluation_of(root, keep=tmp_path / "other")
    assert encoded == 0 and np.array_equal(found.blocks, features_of(whole, whole.train).blocks)


def test_two_ranks_get_the_bits_of_one(root, tmp_path):
    """Though they encode other images together: one a batch of 16, 16 and 8, two of 7."""
    evaluation, _ = counted(root, tmp_path)
    expected = features_of(evaluation, evaluation.train)
    assert_all(run_ranks(compute, 2, tmp_path / "output", str(root), str(tmp_path / "two"), 7))
    for rank in range(2):
        with np.load(tmp_path / "two" / f"{rank}.npz") as found:
            for name in ("blocks", "labels", "indices"):
                assert np.array_equal(found[name], getattr(expected, name)), name


def test_both_parts_of_a_single_split_are_kept_apart(tmp_path):
    write_colours(tmp_path, "train", 40)
    images = open_images(str(tmp_path))
    train, test = labelled_pair(images, images, "label")
    evaluation, calls = counted(tmp_path, tmp_path, train=train, test=test)
    assert [calls.of(lambda part=part: features_of(evaluation, part))[1] for part in (train, test, train)] == [32, 8, 0]
    assert features_of(evaluation, test).indices.tolist() == test.indices.tolist()


def test_features_that_another_node_does_not_see(root, tmp_path, monkeypatch):
    evaluation, _ = counted(root, tmp_path)
    features_of(evaluation, evaluation.train)
    monkeypatch.setattr(features, "_holding", lambda *_: tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="elsewhere is not there on every node: give --cache-dir on a disk that all"):
        features_of(evaluation, evaluation.train)


def test_splits_of_the_folder_are_apart(root):
    train, test = splits_of_folder(root)
    assert (len(train), len(test)) == (40, 24) and np.bincount(train.labels).tolist() == [10] * 4
