import gc
import time
import weakref

import pytest
import torch

from ijepa_kernels import dispatch
from ijepa_scale.data.collate import Batch
from ijepa_scale.engine.feed import Feed, HostCopy, collecting_by_hand
from tests.engine import tiny

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def batches(count: int, seconds: float = 0.0):
    for step in range(count):
        time.sleep(seconds)
        images, masks = tiny.whole_batch(step)
        yield Batch(images, masks, (step,))


@pytest.mark.parametrize("device", DEVICES)
def test_batches_come_whole_and_in_order(device):
    feed = Feed(batches(5), torch.device(device))
    for step in range(5):
        if step % 2:  # loaded ahead or not
            feed.load()
        batch = feed.take()
        expected_images, expected_masks = tiny.whole_batch(step)
        assert batch.indices == (step,)
        assert all(tensor.device.type == device for tensor in batch.tensors())
        assert len(batch.tensors()) == 12
        assert torch.equal(batch.images.cpu(), expected_images)
        assert torch.equal(batch.masks.prediction.indices_T.cpu(), expected_masks.prediction.indices_T)
        assert torch.equal(batch.masks.target_index_T.cpu(), expected_masks.target_index_T)
    with pytest.raises(StopIteration):
        feed.take()


def test_an_error_is_raised_where_its_batch_would_be_handed_out():
    def failing():
        yield from batches(1)
        raise ValueError("a bad shard")

    feed = Feed(failing(), torch.device("cpu"))
    feed.load()
    first = feed.take()
    feed.load()
    assert first.indices == (0,)
    with pytest.raises(ValueError, match="a bad shard"):
        feed.take()


def test_the_wait_for_the_loader_is_counted():
    feed = Feed(batches(3, seconds=0.05), torch.device("cpu"))
    feed.load()
    feed.take()
    feed.take()
    assert 0.1 <= feed.waits.seconds < 1.0


@pytest.mark.gpu
def test_a_wait_behind_which_the_gpu_works_is_none():
    device = torch.device("cuda")
    feed = Feed(batches(2, seconds=0.2), device)
    torch.cuda._sleep(10**9)  # cycles: half a second or so
    feed.load()
    feed.take()
    torch.cuda.synchronize()
    assert feed.waits.seconds < 0.02
    feed.load()  # with nothing to do
    torch.cuda.synchronize()
    assert 0.15 < feed.waits.seconds < 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_reach_the_host(device):
    values = [torch.tensor(2.5, device=device, requires_grad=True), torch.tensor(float("inf"), device=device)]
    assert HostCopy([*values, torch.tensor(-3.0, device=device, dtype=torch.bfloat16)]).numbers() == [
        2.5,
        float("inf"),
        -3.0,
    ]


class Node:
    """Part of a cycle."""


def test_cycles_are_collected_by_hand_only():
    def cycle() -> weakref.ref:
        one, other = Node(), Node()
        one.other, other.other = other, one
        return weakref.ref(one)

    with collecting_by_hand():
        left = cycle()
        for _ in range(10_000):  # many times what sets off a collection otherwise
            cycle()
        assert left() is not None
        gc.collect()
        assert left() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("recompute_every", [(0, 0), (2, 1)])
def test_no_step_asks_the_device(recompute_every):
    """Meta tensors have no values: whatever would wait for one (.item(), .tolist(), a boolean mask) fails on them."""
    images, masks = tiny.whole_batch(0)
    assert masks.context.num_tokens % len(images) != 0  # ragged
    model = tiny.build_model(recompute_every=recompute_every, variance=0.1, covariance=0.1)
    model.to("meta", torch.bfloat16)
    with dispatch.recording() as launches:
        model(images.to("meta"), masks.to("meta"))["loss"].backward()
    assert len(launches) > 10
    assert model.predictor.mask_token.grad is not None
    with pytest.raises(RuntimeError):
        masks.to("meta").context.cu_seqlens.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_asks_the_gpu(compiled):
    model = tiny.build_model(compiled=compiled, recompute_every=(2, 1), variance=0.1, covariance=0.1)
    model.to("cuda", torch.bfloat16)
    feed = Feed((batch.pin_memory() for batch in batches(6)), torch.device("cuda"))
    results = []
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step >= 4 else "default")  # kernels are compiled before
        try:
            batch = feed.take()
            loss = model(batch.images, batch.masks)["loss"]
            loss.backward()
            feed.load()
            results.append(HostCopy([loss]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(result.numbers()[0] > 0 for result in results)
