"""What keeps the device from waiting: batches copied ahead, results fetched behind, no collections by surprise."""

import contextlib
import gc
import time
from collections import deque
from collections.abc import Iterator

import torch

from ijepa_scale.data.collate import Batch


class Stopwatch:
    """Seconds of the device's time, in all, between what was given to it before running() and after it.

    On a GPU those of what it has come past, so a step late.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds = 0.0
        self._ahead: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> float:
        while self._ahead and self._ahead[0][1].query():
            before, after = self._ahead.popleft()
            self._seconds += before.elapsed_time(after) / 1000
        return self._seconds

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        if self.device.type == "cuda":
            before = self._moment()
            yield
            self._ahead.append((before, self._moment()))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def _moment(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class Feed:
    """Batches on the device. load() starts copying the next one, on a stream of its own; take() hands it out.

    waits: how long the loader has kept the device waiting. forwards: for the forwards of what is fed.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device):
        self.batches, self.device = batches, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waits, self.forwards = Stopwatch(device), Stopwatch(device)
        self._loaded: Batch | Exception | None = None

    def load(self) -> None:
        """Fetch the next batch and start its copy. What goes wrong is raised by the take() that would hand it out."""
        with self.waits.running():
            try:
                batch = next(self.batches)
            except Exception as error:
                self._loaded = error
                return
            with torch.cuda.stream(self.stream):
                self._loaded = batch.map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True).contiguous())

    def take(self) -> Batch:
        """The next batch, for work on the current stream. Raises what the loader raised."""
        if self._loaded is None:
            self.load()
        batch, self._loaded = self._loaded, None
        if isinstance(batch, Exception):
            raise batch
        assert batch is not None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            # Its memory belongs to the other stream, which may not have it back before this one's work is done.
            for tensor in batch.tensors():
                tensor.record_stream(current)
        return batch


class HostCopy:
    """Numbers on their way from the device; numbers() waits for them alone, not for work given to the device since."""

    def __init__(self, values: list[torch.Tensor]):
        """values: scalars of any float dtype on one device."""
        self.copy = torch.stack([value.detach().float() for value in values]).to("cpu", non_blocking=True)
        self.done = None
        if values[0].device.type == "cuda":
            self.done = torch.cuda.Event()
            self.done.record()

    def numbers(self) -> list[float]:
        if self.done is not None:
            self.done.synchronize()
        return self.copy.tolist()


@contextlib.contextmanager
def collecting_by_hand() -> Iterator[None]:
    """Python collects cycles only where gc.collect() is called: on all ranks after the same steps.

    On its own each rank would pause at another time, and all others would wait for it in the next collective.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
