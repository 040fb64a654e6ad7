"""Images and masks -> Batch: the micro-batch of any rank at any micro-step, as a pure function of its position."""

import contextlib
import ctypes
import errno
import gc
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.queues import Queue
from typing import Any, Self

import numpy as np
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.images import BadImage, ImageSet
from ijepa_scale.data.mixture import Mixture
from ijepa_scale.data.order import CROP
from ijepa_scale.data.sources.remote import StreamError
from ijepa_scale.data.streams.dealing import StreamProgress, Streams
from ijepa_scale.data.transforms import RandomCrop
from ijepa_scale.masking.packing import map_tensors

OPTION = "data.workers"
PREFETCH = 4  # micro-batches that a loader process makes ahead
SHARED_MEMORY = "/dev/shm"  # where they lie until the rank has taken them
CLOSE_SECONDS = 5.0  # for loader processes to end by themselves
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Batch:
    """One micro-batch. indices: which image each is. bad: unreadable images met.

    images: (B, 3, S, S) uint8; loader processes leave their channels last in memory, to be moved on the device.
    masks: what the objective drew for these images, a frozen dataclass of tensors.
    Of a stream, indices are rows of shards, names say which, and stream is where it goes on after the batch.
    """

    images: torch.Tensor
    masks: Any
    indices: tuple[int, ...]
    bad: tuple[BadImage, ...] = ()
    names: tuple[str, ...] = ()
    stream: StreamProgress | None = None

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(self, images=change(self.images), masks=map_tensors(self.masks, change))

    def tensors(self) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        self.map_tensors(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory; the loader's thread calls it."""
        return self.map_tensors(torch.Tensor.pin_memory)


@dataclass(frozen=True)
class FailedBatch:
    """What comes in the place of a micro-batch that cannot be made, also out of a loader process: why, in words."""

    message: str


class LoadError(Exception):
    """No more micro-batches can be made. The message says what failed and what to do."""

    local = True  # to be said by whichever rank it befell


@dataclass(frozen=True, kw_only=True)
class MicroBatches(Dataset):
    """Item i is this rank's micro-batch at micro-step i of the run, or why there is none.

    The global batch of a step is cut in order: micro-step a of rank r takes the images at positions
    (a * ranks + r) * micro_batch_size onwards. What stands at a position (image, crop, masks) depends on the seed, the
    step and the position alone, so ranks, workers, accumulation and restarts do not change what is trained on.
    """

    images: ImageSet | Mixture | Streams
    draw_masks: Callable[[int, range], Any]  # (step, positions in the global batch) -> masks of the images there
    seed: int
    image_size: int
    crop_scale: tuple[float, float]
    horizontal_flip: bool = False
    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    ranks: int = 1

    @property
    def accumulation_steps(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.ranks)

    def __getitem__(self, micro_step: int) -> Batch | FailedBatch:
        try:
            return self.batch(micro_step)
        except (BadImageError, StreamError) as error:
            return FailedBatch(str(error))

    def batch(self, micro_step: int) -> Batch:
        """Raises BadImageError where too many images are bad, StreamError where a stream cannot go on."""
        step, micro = divmod(micro_step, self.accumulation_steps)
        first = (micro * self.ranks + self.rank) * self.micro_batch_size
        positions = range(first, first + self.micro_batch_size)
        masks, crops = self.draw_masks(step, positions), [self._crop(step, position) for position in positions]
        if isinstance(self.images, Streams):  # which are in order: streams take turns, and their processes with them
            taken, missed, stream = self.images.take(micro_step % self.images.num_streams, crops)
            rows, names, pixels = zip(*taken, strict=True)
            return Batch(_stacked(pixels), masks, rows, tuple(missed), names, stream)
        size = self.global_batch_size
        indices = [self.images.image_at(self.seed, step, at, global_batch_size=size) for at in positions]
        pixels, bad = zip(*map(self.images.crop_or_substitute, indices, crops), strict=True)
        return Batch(_stacked(pixels), masks, tuple(indices), tuple(itertools.chain.from_iterable(bad)))

    def _crop(self, step: int, position: int) -> RandomCrop:
        """That of whichever image comes to stand at a position of a step."""
        key = (self.seed, CROP, step, position)
        return RandomCrop(self.image_size, key, scale=self.crop_scale, flip=self.horizontal_flip)

    def preview(self, step: int) -> Batch:
        """A micro-batch to look at, which moves no stream on: of streams the first images as they are stored."""
        images = self.images
        if isinstance(images, Streams):
            images = replace(images, shuffle_buffer=1, positions=None, _open={})
        return replace(self, images=images).batch(step * self.accumulation_steps)


def _stacked(crops: Sequence[np.ndarray]) -> torch.Tensor:
    """(B, 3, S, S) of crops, (3, S, S) each; in memory channels are the last dimension, as they are in the crops."""
    return torch.from_numpy(np.stack([crop.transpose(1, 2, 0) for crop in crops])).permute(0, 3, 1, 2)


class MicroBatchStream:
    """Micro-batches, in order, and the processes that load them, which end with the last batch, an error or close()."""

    def __init__(self, loader: DataLoader) -> None:
        before = set(multiprocessing.active_children())
        try:
            self._batches: Any = iter(loader)
        except BaseException:  # of several processes the first ones run
            _kill(set(multiprocessing.active_children()) - before)
            raise
        self._processes = set(multiprocessing.active_children()) - before

    def __iter__(self) -> Self:
        return self

    def __len__(self) -> int:
        """Of all batches, from the first on."""
        return len(self._batches)

    def __next__(self) -> Any:
        """A Batch, or what else the loader makes. Raises LoadError where the micro-batch cannot be made."""
        try:
            batch = next(self._batches)
            if isinstance(batch, FailedBatch):
                raise LoadError(batch.message)
            return batch
        except BaseException:  # an error would keep hold of them
            self.close()
            raise

    def close(self) -> None:
        """End the processes, by force if need be: they ignore SIGTERM, which Python would send them at its end."""
        late = threading.Timer(CLOSE_SECONDS, _kill, [self._processes])
        late.start()
        try:
            with _nothing_said_of_children():
                if hasattr(self._batches, "_shutdown_workers"):  # it has in torch 2.0 to 2.15, when there are any
                    self._batches._shutdown_workers()
                _kill(self._processes)
        finally:
            late.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def micro_batch_stream(
    dataset: MicroBatches, *, start_step: int, stop_step: int, workers: int, pinned: bool = False
) -> MicroBatchStream:
    """This rank's micro-batches from start_step up to stop_step, in order, loaded by worker processes.

    pinned: in page-locked memory, from which copies to a GPU take no part of the host's time.

    Of streams there is a process for each: micro-step m is made by process m - start, modulo their number, and that is
    always the same stream.
    """
    accumulation = dataset.accumulation_steps
    workers = loader_processes(dataset.images, workers)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start_step * accumulation, stop_step * accumulation),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=pinned,
        worker_init_fn=start_worker,
    )
    return MicroBatchStream(loader)


def loader_processes(images: ImageSet | Mixture | Streams, workers: int) -> int:
    """Of a rank with data.workers."""
    return images.num_streams if isinstance(images, Streams) and workers else workers


def shared_memory() -> tuple[str, int] | None:
    """(which one it is, bytes free) of the memory that loader processes share with this one; None where unknown.

    Ranks to which it is the same one share its space.
    """
    try:
        space, device = os.statvfs(SHARED_MEMORY), os.stat(SHARED_MEMORY).st_dev
    except OSError:
        return None
    return f"{os.uname().nodename}:{device}", space.f_bavail * space.f_frsize


def check_batches_fit(
    *, batch_bytes: int, workers: int, ranks: int, free: int, ahead: int = PREFETCH, option: str = OPTION
) -> None:
    """ValueError where what loader processes make ahead does not fit into shared memory.

    batch_bytes: of a micro-batch's images. workers: loader processes of a rank, as the option says. ranks: that share
    the memory. ahead: micro-batches that a process makes ahead.
    """
    need = batch_bytes * (ahead * workers + 1) * ranks  # and one that the rank is about to copy
    if need <= free:
        return
    most = max(0, free // (batch_bytes * ranks) - 1) // ahead
    raise ValueError(
        f"{SHARED_MEMORY} has {free / 2**20:,.0f} MiB free, and loader processes need {need / 2**20:,.0f} MiB of it: "
        f"{batch_bytes / 2**20:,.1f} MiB a micro-batch x ({ahead} made ahead x {option} {workers} + 1)"
        f"{f' x {ranks} ranks' * (ranks > 1)}; start the container with --shm-size={-(-need * 2 // 2**30)}g (or "
        f"--ipc=host), or set {option}={most}"
        + (" (the training process then loads)" if not most and option == OPTION else "")
    )


def why_loaders_failed(error: RuntimeError | OSError) -> str:
    """What keeps loader processes from starting or from handing over their batches, and a remedy; "" if not known."""
    said = str(error)
    # A library says no more than this: torch of its loaders, in words that have not changed since torch 1.0.
    if "unable to allocate shared memory" in said or "unable to resize file" in said:
        return f"{SHARED_MEMORY} is full; start the container with a larger --shm-size"
    if "DataLoader worker" in said and ("killed by signal" in said or "exited unexpectedly" in said):
        return "a loader process was killed, perhaps as the machine's memory ran out"
    if "Too many open files" in said or "received 0 items of ancdata" in said:
        return "too many files are open; raise the limit (ulimit -n)"
    if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOMEM):
        return "no more processes can be started"
    return ""


@contextlib.contextmanager
def _nothing_said_of_children() -> Iterator[None]:
    """Within it torch's handler, which raises an error wherever a loader process dies, is not called."""
    if threading.current_thread() is not threading.main_thread():  # there signal handlers are neither set nor run
        yield
        return
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if previous is None else previous)


def _kill(processes: set[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(1.0)  # none outlives it, but one that waits for a dead network disk may take its time


def start_worker(worker: int) -> None:
    """For a loader process to begin with: it ends with its rank, and not by a signal that is meant for the rank."""
    # Ctrl-C reaches the whole process group: the rank decides when its workers end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # but with the rank they end at once
    Queue._on_queue_feeder_error = _send_the_error  # type: ignore[attr-defined]  # in this process alone
    gc.enable()  # a rank collects by hand while it trains, and a fork of it would never collect


def _send_the_error(queue: Any, error: BaseException, item: tuple[int, Any]) -> None:
    """What cannot be sent, as shared memory or open files run out, becomes an error of its batch.

    A queue's thread would only print it, and the rank wait for the batch for ever.
    """
    instead = ExceptionWrapper((type(error), error, error.__traceback__), where="in a loader process")
    with contextlib.suppress(ValueError):  # of a queue that is closed: nobody waits any more
        queue.put((item[0], instead))
