"""What keeps the device from waiting: batches copied ahead, results fetched behind, no collections by surprise."""

import contextlib
import gc
import time
from collections import deque
from collections.abc import Iterator

import torch

from ijepa_scale.data.collate import Batch


class Feed:
    """Batches on the device. load() starts copying the next one, on a stream of its own; take() hands it out."""

    def __init__(self, batches: Iterator[Batch], device: torch.device):
        self.batches, self.device = batches, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waited = 0.0
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._loaded: Batch | Exception | None = None

    @property
    def waited(self) -> float:
        """Seconds that the loader has kept the device waiting, in all.

        On a GPU those in which it had done what it was given: of waits that it has come past, so a step late.
        """
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            self._waited += before.elapsed_time(after) / 1000
        return self._waited

    def load(self) -> None:
        """Fetch the next batch and start its copy. What goes wrong is raised by the take() that would hand it out."""
        started, before = time.perf_counter(), self._moment()
        try:
            batch = next(self.batches)
        except Exception as error:
            self._loaded = error
        else:
            with torch.cuda.stream(self.stream):
                self._loaded = batch.map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True).contiguous())
        after = self._moment()
        if before is None or after is None:
            self._waited += time.perf_counter() - started
        else:
            self._waits.append((before, after))

    def _moment(self) -> torch.cuda.Event | None:
        """When a GPU has done what it was given so far."""
        if self.stream is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

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
