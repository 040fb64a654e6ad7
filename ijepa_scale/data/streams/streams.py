"""Endless streams of images that are read from front to back, and whose whole state is a few integers.

A source is a list of shards (shards.py). They are dealt to the ranks, and each rank's to its streams, one for each
loader process. A stream goes through its shards in another order at every pass and shuffles within blocks: it reads
shuffle_buffer images, puts them in a random order, and hands them out while it reads the next block. So the place where
the block began, and how much of it was handed out, say all that is to come.
"""

import dataclasses
import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ijepa_scale.data.decoding import MAX_PIXELS, BadImageError, Limits, reason_of
from ijepa_scale.data.images import MAX_SUBSTITUTES, BadImage
from ijepa_scale.data.order import generator_for, mixture_place, permuted_index, source_seed
from ijepa_scale.data.sources.folders import printable
from ijepa_scale.data.sources.remote import DeadLinkError, Patience, StreamError, is_remote, read_listed
from ijepa_scale.data.streams.shards import DAMAGED, START, Encoded, Mark, read_shard
from ijepa_scale.data.transforms import RandomCrop

State = dict[str, Any]  # as JSON holds it


@dataclass(frozen=True)
class Shards:
    """One split of a source. column: of images, in Parquet and Arrow files. num_images: 0 where it is not known."""

    name: str
    locations: Sequence[str]
    column: str = ""
    num_images: int = 0


@dataclass(frozen=True)
class Place:
    """Between two images of a stream. number: of passes before this one. shard: in the order of this pass."""

    number: int = 0
    shard: int = 0
    mark: Mark = START


@dataclass(frozen=True)
class Read:
    """An image as stored. number: of the pass. after: the place after it. reason: why there is none, if so."""

    number: int
    index: int
    name: str
    after: Place
    file: bytes | str = b""
    reason: str = ""


@dataclass
class _Block:
    """Images of one pass. number: of blocks before it in the pass. order: of handing them out, once all are there."""

    start: Place
    pass_number: int
    number: int
    images: list[Read | None] = field(default_factory=list)
    order: list[int] = field(default_factory=list)


class ShardStream:
    """The endless stream of some shards of one source.

    share: (r, n) takes of every shard the rows whose number modulo n is r. state: of an equal stream, to go on from.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        seed: int,
        shuffle_buffer: int,
        patience: Patience,
        share: tuple[int, int] = (0, 1),
        state: State | None = None,
    ):
        self._shards, self._seed, self._share, self._patience = shards, seed, share, patience
        self._size = shuffle_buffer
        state = state or state_at(0)
        number, shard, rows, offset = state["place"]
        place = Place(number, shard, (rows, offset))
        self._reads = self._read_from(place)
        self._ahead = next(self._reads)
        self._block = self._fill(_Block(place, self._ahead.number, state["block"]))
        self._next = self._block_after(self._block)
        # Images of the block that were handed out: all, where a smaller buffer or other shards have made it shorter.
        self._done = min(state["done"], len(self._block.images))
        self._images: int = state["images"]  # and of its pass
        for done in self._block.order[: self._done]:
            self._block.images[done] = None

    def take(self) -> tuple[Read, int]:
        """The next image; and, with the first image of a further pass, how many the pass before had, else 0."""
        ended = 0
        if self._done == len(self._block.images):
            if self._next.pass_number != self._block.pass_number:
                ended, self._images = self._images, 0
            self._block, self._done = self._fill(self._next), 0
            self._next = self._block_after(self._block)
        chosen = self._block.order[self._done]
        read, self._block.images[chosen] = self._block.images[chosen], None
        assert read
        self._done += 1
        self._images += 1
        while len(self._next.images) < self._done and self._grow(self._next):
            pass  # one for each that is handed out: memory stays at one block, and reading does not come in bursts
        return read, ended

    def state(self) -> State:
        start = self._block.start
        place = [start.number, start.shard, *start.mark]
        return {"place": place, "block": self._block.number, "done": self._done, "images": self._images}

    def _grow(self, block: _Block) -> bool:
        """Read one more image into a block, unless it is full or its pass is at its end."""
        if len(block.images) == self._size or self._ahead.number != block.pass_number:
            return False
        block.images.append(self._ahead)
        self._ahead = next(self._reads)
        return True

    def _fill(self, block: _Block) -> _Block:
        while self._grow(block):
            pass
        rng = generator_for(self._seed, block.pass_number, block.number)
        block.order = np.argsort(rng.random(len(block.images)), kind="stable").tolist()
        return block

    def _block_after(self, block: _Block) -> _Block:
        last = block.images[-1]
        assert last
        number = self._ahead.number
        if number == block.pass_number:
            return _Block(last.after, number, block.number + 1)
        return _Block(Place(number), number, 0)

    def _read_from(self, place: Place) -> Iterator[Read]:
        """All images from a place on, pass after pass."""
        number, shard, mark = place.number, place.shard, place.mark
        locations = self._shards.locations
        while True:
            found = (shard, mark) != (0, START)
            while shard < len(locations):
                location = locations[permuted_index(self._seed, number, len(locations), shard)]
                rows = read_shard(
                    location, column=self._shards.column, start=mark, share=self._share, patience=self._patience
                )
                try:
                    for mark, image in rows:
                        if image is not None:
                            found = True
                            yield _read_of(location, image, number, Place(number, shard, mark))
                except DAMAGED as error:
                    if isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE):  # of a disk
                        raise StreamError(
                            f"{printable(location)} cannot be read: {error}; look at the disk, then start the same "
                            "command again"
                        ) from error
                    found = True
                    reason = f"{reason_of(error)}; the rest of this shard is left out"
                    yield Read(number, mark[0], printable(location), Place(number, shard + 1), reason=reason)
                shard, mark = shard + 1, START
            if not found:
                raise StreamError(
                    f"{self._shards.name}: a stream has no images: {len(locations)} shards, of which it takes every "
                    f"{self._share[1]}th; use fewer ranks or loader processes, or more shards"
                )
            number, shard = number + 1, 0


def _read_of(location: str, image: Encoded, number: int, after: Place) -> Read:
    if image.content is None:  # a file of its own
        return Read(number, image.index, printable(image.path), after, file=image.path)
    name = f"{os.path.basename(location)}[{image.index}]" + (f" {image.path}" if image.path else "")
    return Read(number, image.index, printable(name), after, file=image.content)


def state_at(pass_number: int) -> State:
    """The state of a stream at the start of a pass."""
    return {"place": [pass_number, 0, *START], "block": 0, "done": 0, "images": 0}


@dataclass(frozen=True)
class StreamMark:
    """Where a stream stands after a batch. passes: begun in the batch, as (source, pass, images of the one before)."""

    stream: int
    state: State
    passes: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The streams of one rank, over one or several sources mixed by weight. Can be pickled, and used in forked workers.

    Not dealt to ranks yet, as it comes from build.py, it is the only rank's, in one stream.
    states: of each stream, to go on from; None: from its start. min_side, max_pixels: as of Limits.
    num_images: of an epoch, where the user says so; 0: what the sources know.
    """

    sources: tuple[Shards, ...]
    weights: tuple[int, ...] = (1,)
    seed: int
    shuffle_buffer: int
    min_side: int = 1
    max_pixels: int = MAX_PIXELS
    num_images: int = 0
    patience: Patience = field(default_factory=Patience)
    rank: int = 0
    ranks: int = 1
    num_streams: int = 1
    states: tuple[State | None, ...] | None = None
    _open: dict[int, "_Mixed"] = field(default_factory=dict, repr=False, compare=False)  # streams that are in use

    @property
    def name(self) -> str:
        return " + ".join(shards.name for shards in self.sources)

    def __len__(self) -> int:
        """Images of all sources; 0 where that is not known."""
        known = [shards.num_images for shards in self.sources]
        return self.num_images or (sum(known) if all(known) else 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def deal(self, *, rank: int, ranks: int, workers: int) -> "Streams":
        """This rank's share, for as many streams as there are loader processes, or fewer where shards are few."""
        shards = [len(source.locations) for source in self.sources]
        streams = min(max(1, workers), *(n // ranks if n >= ranks else n for n in shards))
        return dataclasses.replace(self, rank=rank, ranks=ranks, num_streams=streams, _open={})

    def going_on(self, states: Sequence[State | None] | None) -> "Streams":
        return dataclasses.replace(self, states=tuple(states) if states else None, _open={})

    def layout(self) -> dict[str, Any]:
        """What must not change for states to be of use."""
        return {
            "ranks": self.ranks,
            "streams": self.num_streams,
            "shards": [len(source.locations) for source in self.sources],
        }

    def dealing(self, workers: int) -> list[str]:
        """How the shards are dealt, for the user who asked for that many loader processes a rank."""
        lines = []
        if self.num_streams < workers:
            fewest = min(self.sources, key=lambda source: len(source.locations))
            lines.append(
                f"warning: {fewest.name} has {len(fewest.locations)} shard(s) for {self.ranks} rank(s), so each runs "
                f"{self.num_streams} loader process(es) and not data.workers={workers}; more shards allow more"
            )
        every = [(rank, stream) for rank in range(self.ranks) for stream in range(self.num_streams)]
        for source in self.sources:
            count = len(source.locations)
            counts = [len(self._dealt(count, *which)) for which in every]
            low, high = min(counts), max(counts)
            shards = f"{count:,} shard{'s' if count > 1 else ''}"
            text = f"{source.name}: {shards} to {self.ranks} x {self.num_streams} streams"
            if count < self.ranks:
                lines.append(
                    f"warning: {text}: fewer shards than ranks, so every rank reads all of them and takes one image "
                    f"in {self.ranks}; use more shards to read less"
                )
            elif low < high:
                lines.append(
                    f"warning: {text}: {low} or {high} each; a stream with fewer comes to its next pass earlier, "
                    "and says so"
                )
            else:
                lines.append(f"{text}: {low} each")
        return lines

    def take(
        self, stream: int, crops: Sequence[RandomCrop]
    ) -> tuple[list[tuple[int, str, np.ndarray]], list[BadImage], StreamMark]:
        """Crops of a stream's next images as (row in its shard, name, pixels), bad ones met, where it stands then."""
        if stream not in self._open:
            self._open[stream] = self._mixed(stream)
        mixed = self._open[stream]
        images: list[tuple[int, str, np.ndarray]] = []
        bad: list[BadImage] = []
        passes = []
        in_a_row = 0
        while len(images) < len(crops):
            source, read, ended = mixed.take()
            if ended:
                passes.append((self.sources[source].name, read.number, ended))
            try:
                pixels = self._cropped(read, crops[len(images)], self.sources[source].locations)
                images.append((read.index, read.name, pixels))
                in_a_row = 0
            except BadImageError as error:
                bad.append(BadImage(read.index, read.name, error.reason))
                in_a_row += 1
            if in_a_row > MAX_SUBSTITUTES:
                raise BadImageError(
                    f"{self.sources[source].name}: {in_a_row} images in a row are bad, the last {read.name} "
                    f"({bad[-1].reason}); check that the data set holds readable images"
                )
        return images, bad, StreamMark(stream, mixed.state(), tuple(passes))

    def _cropped(self, read: Read, crop: RandomCrop, locations: Sequence[str]) -> np.ndarray:
        if read.reason:
            raise BadImageError(read.reason)
        try:
            file = read.file
            if isinstance(file, str) and is_remote(file):
                file = read_listed(file, locations, self.patience)
            return crop.of(file, Limits(self.min_side, self.max_pixels))
        except StreamError:
            raise
        except DeadLinkError as error:
            raise BadImageError(str(error)) from error
        except Exception as error:  # decoders raise whatever the bytes lead them to
            raise BadImageError(reason_of(error)) from error

    def _dealt(self, count: int, rank: int, stream: int) -> range:
        """Which of a source's shards a stream of a rank reads."""
        own = range(count) if count < self.ranks else range(rank, count, self.ranks)
        return own[stream :: self.num_streams]

    def _mixed(self, stream: int) -> "_Mixed":
        start: State = {"taken": 0, "sources": [None] * len(self.sources)}
        state = (self.states[stream] if self.states else None) or start
        parts = []
        for i, source in enumerate(self.sources):
            count = len(source.locations)
            own = [source.locations[k] for k in self._dealt(count, self.rank, stream)]
            parts.append(
                ShardStream(
                    dataclasses.replace(source, locations=own),
                    seed=source_seed(self.seed, i, self.rank, stream),
                    shuffle_buffer=self.shuffle_buffer,
                    patience=self.patience,
                    share=(self.rank, self.ranks) if count < self.ranks else (0, 1),
                    state=state["sources"][i],
                )
            )
        return _Mixed(parts, self.weights, state["taken"])


class _Mixed:
    """Several endless streams as one, by weight."""

    def __init__(self, parts: list[ShardStream], weights: tuple[int, ...], taken: int):
        self._parts, self._weights, self._taken = parts, weights, taken

    def take(self) -> tuple[int, Read, int]:
        source = mixture_place(self._taken, self._weights)[0]
        self._taken += 1
        return source, *self._parts[source].take()

    def state(self) -> State:
        return {"taken": self._taken, "sources": [part.state() for part in self._parts]}


def anew(states: Sequence[State | None], streams: Streams) -> tuple[State, ...]:
    """States of other streams, for these to go on from: each source starts a pass that none of its streams had begun.

    states: of all streams of all ranks there were.
    """
    begun: list[State] = [state for state in states if state and len(state["sources"]) == len(streams.sources)]
    passes = [
        1 + max((state["sources"][i]["place"][0] for state in begun), default=0) for i in range(len(streams.sources))
    ]
    return tuple({"taken": 0, "sources": [state_at(number) for number in passes]} for _ in range(streams.num_streams))
