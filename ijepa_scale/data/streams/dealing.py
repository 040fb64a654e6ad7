"""Shards dealt to the ranks, and each rank's to its streams, one for each loader process; sources mixed by weight."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ijepa_scale.data.decoding import MAX_PIXELS, BadImageError, Limits, reason_of
from ijepa_scale.data.images import MAX_SUBSTITUTES, BadImage
from ijepa_scale.data.order import mixture_turn, source_seed
from ijepa_scale.data.sources.remote import DeadLinkError, Patience, StreamError, is_remote, lasting, read_listed
from ijepa_scale.data.streams.positions import BEGINNING, OptionalPositions, SourcePosition, StreamPosition
from ijepa_scale.data.streams.shard_stream import Read, Shards, ShardStream
from ijepa_scale.data.transforms import RandomCrop


class PassBegun(NamedTuple):
    """A stream has come to the end of its shards. images: that the pass before it had."""

    source: str
    number: int
    images: int


@dataclass(frozen=True)
class StreamProgress:
    """Where the rank's stream of that number goes on after a batch, and the passes that it began within the batch."""

    number: int
    position: StreamPosition
    passes: tuple[PassBegun, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The streams of one rank, over one or several sources mixed by weight. Can be pickled, and used in forked workers.

    Not dealt to ranks yet, as it comes from build.py, it is the only rank's, in one stream.
    positions: of each stream, to go on from; None: from its start. min_side, max_pixels: as of Limits.
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
    positions: tuple[StreamPosition | None, ...] | None = None
    _open: dict[int, "_Mixed"] = field(default_factory=dict, repr=False, compare=False)  # streams that are in use

    @property
    def name(self) -> str:
        return " + ".join(shards.name for shards in self.sources)

    @property
    def digest(self) -> str:
        """Tells streams apart, by the names of their shards: what is in them is seen as they are read.

        Of a URL without its query and its password, as a signed one is signed anew, and passwords change.
        """
        names = [[lasting(str(location)) for location in source.locations] for source in self.sources]
        return hashlib.sha256(repr(names).encode()).hexdigest()

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

    def going_on(self, positions: OptionalPositions | None) -> "Streams":
        """The same streams from there on; None: from their start."""
        return dataclasses.replace(self, positions=tuple(positions) if positions else None, _open={})

    def layout(self) -> dict[str, Any]:
        """What must not change for positions to be of use."""
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
    ) -> tuple[list[tuple[int, str, np.ndarray]], list[BadImage], StreamProgress]:
        """Crops of a stream's next images as (row in its shard, name, pixels), bad ones met, and where it goes on."""
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
                passes.append(PassBegun(self.sources[source].name, read.pass_number, ended))
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
        return images, bad, StreamProgress(stream, mixed.position(), tuple(passes))

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
        position = self.positions[stream] if self.positions else None
        position = position or StreamPosition(0, (BEGINNING,) * len(self.sources))
        parts = []
        for i, source in enumerate(self.sources):
            count = len(source.locations)
            places = self._dealt(count, self.rank, stream)
            own = [source.locations[place] for place in places]
            parts.append(
                ShardStream(
                    dataclasses.replace(source, locations=own, places=places),
                    seed=source_seed(self.seed, i, self.rank, stream),
                    shuffle_buffer=self.shuffle_buffer,
                    patience=self.patience,
                    share=(self.rank, self.ranks) if count < self.ranks else (0, 1),
                    position=position.sources[i],
                )
            )
        return _Mixed(parts, self.weights, position.taken)


class _Mixed:
    """Several endless streams as one, by weight."""

    def __init__(self, parts: list[ShardStream], weights: tuple[int, ...], taken: int):
        self._parts, self._weights, self._taken = parts, weights, taken

    def take(self) -> tuple[int, Read, int]:
        source = mixture_turn(self._taken, self._weights)[0]
        self._taken += 1
        return source, *self._parts[source].take()

    def position(self) -> StreamPosition:
        return StreamPosition(self._taken, tuple(part.position() for part in self._parts))


def anew(positions: OptionalPositions, streams: Streams) -> tuple[StreamPosition, ...]:
    """For these streams to go on after others: each source starts a pass that none of the others had begun in it.

    positions: of all streams of all ranks there were.
    """
    number = len(streams.sources)
    begun = [position.sources for position in positions if position and len(position.sources) == number]
    passes = [1 + max((sources[i].pass_number for sources in begun), default=0) for i in range(number)]
    return (StreamPosition(0, tuple(map(SourcePosition, passes))),) * streams.num_streams
