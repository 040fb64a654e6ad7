"""The endless stream of some shards of one source, read front to back, whose whole position is a few integers.

It goes through its shards in another order at every pass and shuffles within blocks: it reads shuffle_buffer images,
puts them in a random order, and hands them out while it reads the next block. So where the block began, and how much of
it was handed out, say all that is to come.
"""

import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ijepa_scale.data.decoding import reason_of
from ijepa_scale.data.order import generator_for, permuted_index
from ijepa_scale.data.sources.folders import printable
from ijepa_scale.data.sources.remote import Patience, StreamError, is_remote, shown
from ijepa_scale.data.sources.shards import DAMAGED
from ijepa_scale.data.streams.positions import BEGINNING, SourcePosition
from ijepa_scale.data.streams.reading import START, Encoded, ShardPosition, read_shard

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shards:
    """One split of a source. column: of images, in Parquet and Arrow files. num_images: 0 where it is not known.

    places: of those dealt to one stream, in the list of all; empty: it is all.
    """

    name: str
    locations: Sequence[str]
    column: str = ""
    num_images: int = 0
    places: Sequence[int] = ()


@dataclass(frozen=True)
class PassPosition:
    """Between two images of a pass over the shards. shard: in the order of this pass."""

    pass_number: int = 0
    shard: int = 0
    within: ShardPosition = START


@dataclass(frozen=True)
class Read:
    """An image as stored. index: its row in the shard. after: where reading is after it. reason: why there is none."""

    pass_number: int
    index: int
    name: str
    after: PassPosition
    file: bytes | str = b""
    reason: str = ""


@dataclass
class _Block:
    """Images of one pass. number: blocks of the pass before it. order: of handing them out, once all are there."""

    start: PassPosition
    number: int
    images: list[Read | None] = field(default_factory=list)
    order: list[int] = field(default_factory=list)

    @property
    def pass_number(self) -> int:
        return self.start.pass_number


class ShardStream:
    """The endless stream of some shards of one source.

    share: (r, n) takes of every shard the rows whose number modulo n is r. position: of an equal stream, to go on from.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        seed: int,
        shuffle_buffer: int,
        patience: Patience,
        share: tuple[int, int] = (0, 1),
        position: SourcePosition = BEGINNING,
    ):
        self._shards, self._seed, self._share, self._patience = shards, seed, share, patience
        self._size = shuffle_buffer
        start = PassPosition(position.pass_number, position.shard, ShardPosition(position.rows, position.byte))
        self._reads = self._read_from(start)
        self._ahead = next(self._reads)
        if self._ahead.pass_number != start.pass_number:  # nothing was left of that pass
            start = PassPosition(self._ahead.pass_number)
        self._block = self._fill(_Block(start, position.block))
        self._next = self._block_after(self._block)
        # Images of the block that were handed out: all, where a smaller buffer or other shards have made it shorter.
        self._done = min(position.done, len(self._block.images))
        self._images = position.images  # and of its pass
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

    def position(self) -> SourcePosition:
        """Where an equal stream goes on with the image that take() would give next."""
        start = self._block.start
        return SourcePosition(
            *(start.pass_number, start.shard, *start.within),
            block=self._block.number,
            done=self._done,
            images=self._images,
        )

    def _grow(self, block: _Block) -> bool:
        """Read one more image into a block, unless it is full or its pass is at its end."""
        if len(block.images) == self._size or self._ahead.pass_number != block.pass_number:
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
        if self._ahead.pass_number == block.pass_number:
            return _Block(last.after, block.number + 1)
        return _Block(PassPosition(self._ahead.pass_number), 0)

    def _read_from(self, start: PassPosition) -> Iterator[Read]:
        """All images from there on, pass after pass."""
        number, shard, within = start.pass_number, start.shard, start.within
        locations = self._shards.locations
        while True:
            found = (shard, within) != (0, START)
            while shard < len(locations):
                chosen = permuted_index(self._seed, number, len(locations), shard)
                location, place = locations[chosen], (self._shards.places or range(len(locations)))[chosen]
                try:
                    for after, image in self._rows_of(location, within):
                        within = after
                        if image is not None:
                            found = True
                            yield _read_of(location, place, image, number, PassPosition(number, shard, within))
                except DAMAGED as error:
                    found = True
                    reason = f"{reason_of(error)}; the rest of this shard is left out"
                    name = printable(shown(location, place))
                    yield Read(number, within.rows, name, PassPosition(number, shard + 1), reason=reason)
                shard, within = shard + 1, START
            if not found:
                raise StreamError(
                    f"{self._shards.name}: a stream has no images: {len(locations)} shards, of which it takes every "
                    f"{self._share[1]}th; use fewer ranks or loader processes, or more shards"
                )
            number, shard = number + 1, 0

    def _rows_of(self, location: str, start: ShardPosition) -> Iterator[tuple[ShardPosition, Encoded | None]]:
        """read_shard() from there on. What keeps a disk from being read is waited for, as the network is."""
        column, share, patience = self._shards.column, self._share, self._patience
        failing, wait = 0.0, patience.first_wait
        while True:
            try:
                for after, image in read_shard(location, column=column, start=start, share=share, patience=patience):
                    start = after
                    yield start, image
                    failing, wait = 0.0, patience.first_wait
                return
            except (*DAMAGED, StreamError) as error:
                # Of its content, of the network, which has been waited for, or of a shard that was never there.
                cause = error.__cause__ if isinstance(error, StreamError) else error
                if not isinstance(cause, OSError) or cause.errno in (None, errno.EINVAL) or is_remote(location):
                    raise
                if cause.errno == errno.ENOENT and not failing:
                    raise
                failing = failing or time.monotonic()
                if time.monotonic() - failing >= patience.seconds:
                    raise StreamError(
                        f"{printable(location)} cannot be read: {error}; look at the disk, then start the same "
                        "command again; data.retry_seconds sets how long to try"
                    ) from error
                _log.warning("warning: %s: %s; trying again in %g s", printable(location), error, wait)
            time.sleep(wait)
            wait = min(2 * wait, patience.longest_wait)


def _read_of(location: str, place: int, image: Encoded, number: int, after: PassPosition) -> Read:
    """With a name that may be kept and said: before and after a restart it is the same."""
    if image.content is None and image.path:  # a file of its own
        return Read(number, image.index, printable(shown(image.path, place)), after, file=image.path)
    name = f"{os.path.basename(shown(location, place))}[{image.index}]"
    name += f" {shown(image.path)}" if image.path else ""
    return Read(number, image.index, printable(name), after, file=image.content or b"")
