import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.transforms import center_crop
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.evals.extract import extract, pooled
from ijepa_scale.models.vit import VisionTransformer, ViTSize


class Patches(nn.Module):
    """Means of 4 x 4 patches times a weight: features that a test can work out, with a dropout that must be off."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 7.0, dtype=dtype).reshape(3, 2))
        self.dropout = nn.Dropout(0.5)
        self.seen_dtypes = set()

    def forward(self, images):
        self.seen_dtypes.add(images.dtype)
        patches = nn.functional.avg_pool2d(images.to(self.weight.dtype), 4).flatten(2).transpose(1, 2)
        return self.dropout(patches @ self.weight)


def random_images(n, seed=0):
    return torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_features_are_the_mean_over_patches():
    encoder, images = Patches(), random_images(7)
    expected = images.float().mean(dim=(2, 3)) @ encoder.weight.detach()
    features = pooled(encoder, images)
    torch.testing.assert_close(features, expected)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert encoder.seen_dtypes == {torch.uint8}


def test_features_of_blocks_are_side_by_side():
    vit = VisionTransformer(ViTSize(width=8, depth=3, heads=2, mlp_width=8), image_size=8, patch_size=4)
    images = random_images(3)
    features = pooled(vit, images, (-1, 0))
    with torch.no_grad():
        expected = [tokens.mean(dim=1) for tokens in (vit(images), vit.intermediate(images, [0])[0])]
    torch.testing.assert_close(features, torch.cat(expected, dim=1))
    assert torch.equal(pooled(vit, images, (-1,)), pooled(vit, images))


def test_tokens_in_bf16_are_averaged_in_fp32():
    class Rising(nn.Module):
        def forward(self, images):  # 512 tokens of 1, then 512 of 1 + 2**-7, its bf16 neighbour
            tokens = torch.ones(len(images), 1024, 1, dtype=torch.bfloat16)
            tokens[:, 512:] += 2**-7
            return tokens

    features = pooled(Rising(), random_images(2))
    torch.testing.assert_close(features, torch.full((2, 1), 1 + 2**-8))
    assert pooled(Patches(torch.bfloat16), random_images(2)).dtype == torch.float32


def test_training_mode_of_each_module_is_restored_even_after_an_error():
    encoder = nn.Sequential(Patches(), nn.Dropout())
    encoder.train()
    encoder[1].eval()
    pooled(encoder, random_images(2))
    assert encoder.training and encoder[0].dropout.training and not encoder[1].training
    with pytest.raises(RuntimeError):
        pooled(encoder, torch.zeros(2, 5, 8, 8, dtype=torch.uint8))
    assert encoder.training and not encoder[1].training


class Pictures:
    """An image set of so many pictures, 12 x 10 pixels; some of them bad."""

    name, split = "pictures:train", "train"

    def __init__(self, count, bad=()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def read(self, index):
        if index in self.bad:
            raise BadImageError(f"cannot read {index}", "it is bad")
        pixels = np.random.default_rng(index).integers(0, 256, (10, 12, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def sample_id(self, index):
        return f"train[{index}]"


def expected_features(images, indices, encoder):
    crops = [torch.from_numpy(center_crop(images.read(index), 8)) for index in indices]
    return pooled(encoder, torch.stack(crops)).numpy()


class ThreadRanks(Ranks):
    """One of several ranks that are threads of this process."""

    def gather(self, value):
        values, barrier = self.control
        values[self.rank] = value
        barrier.wait(30)
        gathered = list(values)
        barrier.wait(30)
        return gathered


def on_ranks(count, call):
    shared = [None] * count, threading.Barrier(count)
    ranks = [ThreadRanks(rank, count, rank, torch.device("cpu"), shared) for rank in range(count)]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, ranks))


class Counting(Patches):
    """Sizes of the batches that it was given."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return super().forward(images)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("indices", [None, [9, 3, 3, 14, 0, 7, 1]], ids=["all", "some"])
def test_ranks_share_the_images_and_the_first_has_their_features(ranks, indices, tmp_path):
    """In the order asked for, in as many batches on every rank, less what cannot be read; on disk as in memory."""
    images = Pictures(16, bad={3, 15})
    wanted = list(range(16)) if indices is None else indices
    kept = [index for index in wanted if index not in images.bad]

    def call(own):
        encoders = {"a": Counting(), "b": Patches(torch.bfloat16)}
        options = {"image_size": 8, "batch_size": 2, "ranks": own}
        there = extract(encoders, images, indices, **options)
        batches = list(encoders["a"].batches)
        return there, extract(encoders, images, indices, folder=tmp_path, **options), batches

    results = on_ranks(ranks, call)
    share = -(-len(wanted) // ranks)
    for rank, (memory, disk, batches) in enumerate(results):
        assert batches == [2] * (share // 2) + [1] * (share % 2)
        for found in (memory, disk):
            assert found.indices.tolist() == kept
            assert found.unreadable == {index: "it is bad" for index in {*wanted} & images.bad}
            assert list(found.features) == (["a", "b"] if rank == 0 else [])
    memory, disk, _ = results[0]
    np.testing.assert_allclose(memory.features["a"], expected_features(images, kept, Patches()), rtol=1e-6)
    for name in ("a", "b"):
        assert isinstance(disk.features[name], np.memmap) and memory.features[name].dtype == np.float32
        assert np.array_equal(disk.features[name], memory.features[name])
        np.save(tmp_path / "expected.npy", memory.features[name])
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), memory.features[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "b.npy", "expected.npy"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("blocks", [(), (-1, 0)])
def test_patch_features_are_what_is_averaged(ranks, blocks, tmp_path):
    """In the order of the patches, blocks side by side; on disk as in memory."""
    vit = VisionTransformer(ViTSize(width=8, depth=3, heads=2, mlp_width=8), image_size=8, patch_size=4)
    images = Pictures(7, bad={2})

    def call(own):
        options = {"image_size": 8, "batch_size": 2, "ranks": own, "blocks": blocks, "patches": True}
        return extract({"v": vit}, images, **options), extract({"v": vit}, images, folder=tmp_path, **options)

    memory, disk = on_ranks(ranks, call)[0]
    crops = torch.stack([torch.from_numpy(center_crop(images.read(i), 8)) for i in (0, 1, 3, 4, 5, 6)])
    with torch.no_grad():
        expected = torch.cat([vit(crops), vit.intermediate(crops, [0])[0]], dim=2) if blocks else vit(crops)
    for found in (memory, disk):
        assert found.features["v.patches"].shape == (6, 4, 16 if blocks else 8)
        np.testing.assert_allclose(found.features["v.patches"], expected.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.features["v.patches"].mean(axis=1), found.features["v"], rtol=1e-5, atol=1e-6)
    assert np.array_equal(np.load(tmp_path / "v.patches.npy"), memory.features["v.patches"])
    assert isinstance(disk.features["v.patches"], np.memmap)


def test_loader_processes_change_nothing_and_draw_nothing():
    images, state = Pictures(7, bad={2}), torch.get_rng_state()
    found = [
        extract({"a": Patches()}, images, image_size=8, batch_size=3, workers=workers, watch=watch)
        for workers, watch in ((0, iter), (2, list))
    ]
    assert (
        np.array_equal(found[0].features["a"], found[1].features["a"])
        and found[0].indices.tolist() == found[1].indices.tolist()
    )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("more", [{}, {"patches": True, "facts": {}}])
def test_memory_does_not_grow_with_what_goes_to_disk(tmp_path, more):
    class Wide(torch.nn.Module):
        def forward(self, images):
            return torch.zeros(len(images), 1, 1 << 14)

    peaks = []
    for count in (64, 512):
        tracemalloc.start()
        found = extract({"wide": Wide()}, Pictures(count), image_size=8, batch_size=4, folder=tmp_path, **more)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.features["wide"].shape == (count, 1 << 14)  # 4 and 32 MiB
    assert max(peaks) < 3 << 20


def test_no_images_and_none_that_can_be_read(tmp_path):
    options = {"image_size": 8, "batch_size": 2}
    with pytest.raises(ValueError, match="no images of pictures:train"):
        extract({"a": Patches()}, Pictures(0), **options)
    with pytest.raises(ValueError, match="no images of pictures:train"):
        extract({"a": Patches()}, Pictures(3), [], **options)
    message = r"pictures:train: none of 3 images can be read, the first because: cannot read train\[0\]: it is bad"

    def call(own):
        with pytest.raises(BadImageError, match=message):
            extract({"a": Patches()}, Pictures(3, bad={0, 1, 2}), ranks=own, folder=tmp_path / "out", **options)
        return True

    assert on_ranks(2, call) == [True, True]
    assert list((tmp_path / "out").iterdir()) == []


def test_what_the_disk_does_not_take_is_an_error_on_every_rank(tmp_path):
    (tmp_path / "a.npy").mkdir()

    def call(own):
        with pytest.raises(OSError, match=r"a\.npy"):
            extract({"a": Patches()}, Pictures(4), ranks=own, folder=tmp_path, image_size=8, batch_size=2)
        return True

    assert on_ranks(2, call) == [True, True]
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
