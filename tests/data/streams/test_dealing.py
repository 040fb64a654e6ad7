import errno
import itertools
import json
import multiprocessing
import os
import pickle
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ijepa_scale.config import without_secrets
from ijepa_scale.data.collate import LoadError, MicroBatches, micro_batch_stream
from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.order import generator_for, permuted_index, source_seed
from ijepa_scale.data.sources.remote import Patience, StreamError
from ijepa_scale.data.streams import shard_stream
from ijepa_scale.data.streams.dealing import Streams, anew
from ijepa_scale.data.streams.positions import saved_positions
from ijepa_scale.data.streams.reading import read_shard
from ijepa_scale.data.streams.shard_stream import Shards
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.multiblock import MultiBlock
from ijepa_scale.objectives.masks import BlockMasks
from tests.data.server import serving
from tests.data.small_sources import WHOLE, number_of, write_images, write_parquet, write_tar

SIZES = (5, 9, 2, 7, 4)
PATIENCE = Patience(0.1, 0.01)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Five tars of SIZES images, numbered through."""
    root, first = tmp_path_factory.mktemp("tars"), 0
    for i, size in enumerate(SIZES):
        write_tar(root / f"{i}.tar", range(first, first + size))
        first += size
    return Shards("tars:train", [str(root / f"{i}.tar") for i in range(len(SIZES))])


def rows_of(shard):
    """Numbers of the images of one of the tars."""
    return list(range(sum(SIZES[:shard]), sum(SIZES[: shard + 1])))


def streams_of(*sources, **options):
    return Streams(**{"sources": sources, "seed": 3, "shuffle_buffer": 4, "patience": PATIENCE, **options})


def numbers(streams, count, stream=0):
    return [number_of(image) for _, _, image in streams.take(stream, [WHOLE] * count)[0]]


def in_order(shards, count, *, seed, size, share=(0, 1)):
    """The first images of a stream, by the rule: shards in the pass's order, cut into blocks, each in its order."""
    found = []
    for number in itertools.count():
        order = [shards[permuted_index(seed, number, len(shards), i)] for i in range(len(shards))]
        rows = [row for shard in order for i, row in enumerate(rows_of(shard)) if i % share[1] == share[0]]
        for block, start in enumerate(range(0, len(rows), size)):
            part = rows[start : start + size]
            draws = generator_for(seed, number, block).random(len(part))
            found += [part[i] for i in sorted(range(len(part)), key=lambda i: draws[i])]
        if len(found) >= count:
            return found[:count]


@pytest.mark.parametrize("size", [1, 4, 9, 1000])
@pytest.mark.parametrize("ranks, workers, rank, stream", [(1, 0, 0, 0), (2, 1, 1, 0), (2, 2, 0, 1), (7, 3, 1, 2)])
def test_the_order_is_the_rule_s(tars, size, ranks, workers, rank, stream):
    dealt = streams_of(tars, shuffle_buffer=size).deal(rank=rank, ranks=ranks, workers=workers)
    if ranks > len(SIZES):  # fewer shards than ranks: every rank reads all, and takes its part of the rows
        own, share = list(range(len(SIZES)))[stream::3], (rank, ranks)
    else:
        own, share = list(range(rank, len(SIZES), ranks))[stream :: max(1, workers)], (0, 1)
    assert dealt.num_streams == max(1, workers)
    expected = in_order(own, 100, seed=source_seed(3, 0, rank, stream), size=size, share=share)
    assert numbers(dealt, 100, stream) == expected


def test_passes_differ_and_shuffle(tars):
    seen = numbers(streams_of(tars), 3 * sum(SIZES))
    passes = [seen[start : start + sum(SIZES)] for start in range(0, len(seen), sum(SIZES))]
    assert all(sorted(part) == list(range(sum(SIZES))) for part in passes)
    assert len({tuple(part) for part in [*passes, tuple(range(sum(SIZES)))]}) == 4
    assert numbers(streams_of(tars, seed=4), 20) != seen[:20]


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("ranks", [1, 6])
def test_a_position_goes_on_exactly(tars, size, ranks):
    """From any image of three passes; through a checkpoint's JSON; and the position after going on is the same, too."""
    new = streams_of(tars, shuffle_buffer=size).deal(rank=ranks - 1, ranks=ranks, workers=1)
    if ranks == 6:
        new = streams_of(Shards("one", tars.locations[1:2]), shuffle_buffer=size).deal(rank=1, ranks=2, workers=2)
    whole = new.going_on(None)
    taken = [whole.take(0, [WHOLE]) for _ in range(80)]
    for done in (1, 2, 3, 4, 5, 26, 27, 28, 53, 54, 55, 79):
        manifest = {"stream_positions": [[taken[done - 1][2].position.to_json()]]}
        again = new.going_on(saved_positions(json.loads(json.dumps(manifest)))[0])
        for images, _, progress in taken[done:]:
            ((row, name, image),), _, other = again.take(0, [WHOLE])
            assert (row, name, number_of(image)) == (*images[0][:2], number_of(images[0][2]))
            assert other == progress


def test_a_smaller_buffer_goes_on_with_the_next_block(tars):
    """As --allow-changes lets a run do: more images were handed out than the block has now."""
    *_, progress = streams_of(tars, shuffle_buffer=9).take(0, [WHOLE] * 7)
    changed = streams_of(tars, shuffle_buffer=4).going_on([progress.position])
    expected = in_order(list(range(len(SIZES))), 20, seed=source_seed(3, 0, 0, 0), size=4)[4:]
    assert numbers(changed, 16) == expected


def test_a_position_is_small(tars):
    streams = streams_of(tars, shuffle_buffer=1000)
    progress = streams.take(0, [WHOLE] * 20)[2]
    assert len(json.dumps(progress.position.to_json())) < 150
    assert pickle.loads(pickle.dumps(streams))._open == {}


def test_memory_is_that_of_one_block(tmp_path, monkeypatch):
    """The next block is read while this one is handed out, and no faster."""
    shards = Shards("x:train", [str(write_tar(tmp_path / "x.tar", range(60)))])
    streams = streams_of(shards, shuffle_buffer=10)
    for _ in range(100):
        streams.take(0, [WHOLE])
        (part,) = streams._open[0]._parts
        held = [read for read in (*part._block.images, *part._next.images, part._ahead) if read]
        assert len(held) <= 11


def test_ranks_and_streams_share_the_images_out(tars):
    """Two ranks of two streams over five uneven shards: every image, once a pass of its stream; nobody waits."""
    counts = Counter()
    for rank, stream in itertools.product(range(2), range(2)):
        dealt = streams_of(tars).deal(rank=rank, ranks=2, workers=2)
        own = [row for shard in list(range(rank, 5, 2))[stream::2] for row in rows_of(shard)]
        images, _, progress = dealt.take(stream, [WHOLE] * (3 * len(own)))
        counts.update(number_of(image) for _, _, image in images)
        assert progress.passes == (("tars:train", 1, len(own)), ("tars:train", 2, len(own)))
        assert dealt.take(stream, [WHOLE])[2].passes == (("tars:train", 3, len(own)),)
        assert dealt.take(stream, [WHOLE])[2].passes == ()
    assert counts == dict.fromkeys(range(sum(SIZES)), 3)


@pytest.mark.parametrize("ranks, workers, streams", [(1, 8, 5), (2, 8, 2), (3, 1, 1), (5, 4, 1)])
def test_as_many_streams_as_shards_allow_the_same_on_every_rank(tars, ranks, workers, streams):
    everything = Counter()
    for rank in range(ranks):
        dealt = streams_of(tars).deal(rank=rank, ranks=ranks, workers=workers)
        assert dealt.num_streams == streams
        assert dealt.layout() == {"ranks": ranks, "streams": streams, "shards": [5]}
        for stream in range(streams):
            source = dealt._mixed(stream)._parts[0]
            for _ in range(27):
                read, _ = source.take()
                if read.pass_number:
                    break
                everything[read.name] += 1
    assert set(everything.values()) == {1}
    assert len(everything) == sum(SIZES)


def test_fewer_shards_than_ranks(tmp_path):
    """Each rank takes its part of the rows of every shard: all images come, each on one rank."""
    paths = [str(write_tar(tmp_path / f"{i}.tar", range(20 * i, 20 * i + 12 + i))) for i in range(2)]
    seen = []
    for rank in range(3):
        dealt = streams_of(Shards("x:train", paths)).deal(rank=rank, ranks=3, workers=8)
        assert dealt.num_streams == 2
        for stream in range(2):
            own = [row + 20 * stream for row in range(12 + stream) if row % 3 == rank]
            taken, _, progress = dealt.take(stream, [WHOLE] * (len(own) + 1))
            seen += [number_of(image) for _, _, image in taken[:-1]]
            assert progress.passes == (("x:train", 1, len(own)),)
    assert sorted(seen) == [*range(12), *range(20, 33)]


def test_how_shards_are_dealt_is_said(tars):
    def said(ranks, workers):
        return streams_of(tars).deal(rank=0, ranks=ranks, workers=workers).dealing(workers)[0]

    assert said(5, 1) == "tars:train: 5 shards to 5 x 1 streams: 1 each"
    assert said(2, 2).startswith("warning: tars:train: 5 shards to 2 x 2 streams: 1 or 2 each; ")
    assert said(2, 3).startswith("warning: tars:train has 5 shard(s) for 2 rank(s), so each runs 2 loader process(es)")
    assert "fewer shards than ranks" in said(6, 1) and "one image in 6" in said(6, 1)


def test_a_stream_without_images_is_an_error_and_no_endless_loop(tmp_path):
    shards = Shards("x:train", [str(write_tar(tmp_path / "x.tar", range(1)))])
    dealt = streams_of(shards).deal(rank=1, ranks=2, workers=1)
    with pytest.raises(StreamError, match="x:train: a stream has no images: 1 shards, of which it takes every 2th"):
        dealt.take(0, [WHOLE])


def test_sources_are_mixed_by_weight(tmp_path):
    """Each in its own order, as alone; in proportion in every stretch; and a position goes on exactly."""
    many = Shards("many:train", [str(write_tar(tmp_path / f"{i}.tar", range(10 * i, 10 * i + 10))) for i in range(2)])
    few = Shards(
        "few:train", [str(write_parquet(tmp_path / f"{i}.parquet", range(100, 107))) for i in range(1)], "image"
    )
    streams = streams_of(many, few, weights=(3, 1))
    taken = [streams.take(0, [WHOLE]) for _ in range(80)]
    seen = [number_of(images[0][2]) for images, _, _ in taken]
    ours = [n for n in seen if n < 100]
    assert [number // 100 for number in seen[:8]].count(1) == 2
    for stop in range(1, 81):
        assert abs(sum(number >= 100 for number in seen[:stop]) - stop / 4) <= 1
    assert ours == numbers(streams_of(many), len(ours))
    assert streams.name == "many:train + few:train" and len(streams) == 0
    for done in (1, 2, 17, 40):
        again = streams.going_on([taken[done - 1][2].position])
        assert numbers(again, 80 - done) == seen[done:]
    passes = [progress.passes for _, _, progress in taken if progress.passes]
    assert [sources[0][0] for sources in passes].count("few:train") == 2


def test_bad_images_are_passed_over_and_named(tmp_path):
    folder = write_images(tmp_path / "i", range(12))
    (folder / "0005.png").write_bytes(b"not an image")
    (folder / "0007.png").unlink()
    shards = Shards("i:train", sorted(str(folder / f"{i:04}.png") for i in range(12)))
    streams = streams_of(shards)
    images, bad, progress = streams.take(0, [WHOLE] * 20)
    seen = [number_of(image) for _, _, image in images]
    assert sorted(seen[:10]) == [0, 1, 2, 3, 4, 6, 8, 9, 10, 11]
    names = sorted({other.sample_id.rpartition("/")[2]: other.reason for other in bad}.items())
    assert [name for name, _ in names] == ["0005.png", "0007.png"]
    assert "no image of a known format" in names[0][1] and "No such file" in names[1][1]
    assert number_of(streams.take(0, [WHOLE])[0][0][2]) == numbers(streams.going_on([progress.position]), 1)[0]
    with pytest.raises(BadImageError, match=r"101 images in a row are bad, the last .*less than 9 a side"):
        streams_of(shards, min_side=9).take(0, [WHOLE])


def test_a_disk_that_fails_ends_the_run_rather_than_the_shard(tars, monkeypatch):
    def failing(location, **options):
        yield from [row for row in read_shard(location, **options) if row[0].rows <= 2]
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shard_stream, "read_shard", failing)
    waits = []
    monkeypatch.setattr(shard_stream, "time", SimpleNamespace(sleep=waits.append, monotonic=lambda: 1 + sum(waits)))
    with pytest.raises(StreamError, match=r"\.tar cannot be read: .*Input/output error; look at the disk"):
        streams_of(tars, patience=Patience()).take(0, [WHOLE] * 16)
    assert waits == [1, 2, 4, 8, 16, 32, 64, 64, 64, 64]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EACCES])
def test_a_disk_that_comes_back_costs_nothing(tars, monkeypatch, number, caplog):
    """Whatever it says meanwhile, once in every shard and in the middle of it; then there is no shard for a while."""
    expected = streams_of(tars, patience=Patience()).take(0, [WHOLE] * 40)
    failed, gone = set(), set()

    def failing(location, *, start, **options):
        if location in failed - gone:  # as where a mount is gone
            gone.add(location)
            raise StreamError("it cannot be opened; bring it back") from OSError(errno.ENOENT, "No such file")
        for row, (after, image) in enumerate(read_shard(location, start=start, **options)):
            if row == 1 and location not in failed:
                failed.add(location)
                raise OSError(number, os.strerror(number))
            yield after, image

    monkeypatch.setattr(shard_stream, "read_shard", failing)
    monkeypatch.setattr(shard_stream.time, "sleep", lambda seconds: None)
    images, bad, progress = streams_of(tars, patience=Patience()).take(0, [WHOLE] * 40)
    assert failed == gone == set(tars.locations) and not bad and progress == expected[2]
    assert [row for _, row, _ in images] == [row for _, row, _ in expected[0]]
    assert sum("trying again in 1 s" in record.getMessage() for record in caplog.records) == len(failed)


def test_a_damaged_shard_costs_its_rest_alone(tars, tmp_path):
    content = Path(tars.locations[1]).read_bytes()
    (tmp_path / "1.tar").write_bytes(content[: len(content) * 2 // 3])
    shards = Shards("t:train", [tars.locations[0], str(tmp_path / "1.tar"), tars.locations[2]])
    streams = streams_of(shards, shuffle_buffer=1)
    images, bad, _ = streams.take(0, [WHOLE] * 16)
    whole = [number_of(image) for _, _, image in images]
    assert {0, 1, 2, 3, 4, 5, 6, 14, 15} <= set(whole) < set(range(16))
    assert {other.reason[-33:] for other in bad} == {"; the rest of this shard is left out"[-33:]}
    assert {other.sample_id for other in bad} == {str(tmp_path / "1.tar")}
    taken = [streams_of(shards, shuffle_buffer=2).take(0, [WHOLE])]
    again = streams_of(shards, shuffle_buffer=2)
    taken_again = [again.take(0, [WHOLE]) for _ in range(40)]
    for done in range(1, 20):
        more = again.going_on([taken_again[done - 1][2].position])
        assert [more.take(0, [WHOLE])[2] for _ in range(done, 40)] == [
            progress for _, _, progress in taken_again[done:]
        ]
    assert taken[0][2] == taken_again[0][2]


def test_dead_links_are_bad_images_and_a_dead_network_is_an_error(tmp_path):
    write_images(tmp_path, range(6))
    (tmp_path / "0003.png").unlink()
    with serving(tmp_path) as server:
        shards = Shards("list:train", [f"{server.url}/{i:04}.png" for i in range(6)])
        images, bad, _ = streams_of(shards).take(0, [WHOLE] * 5)
        assert sorted(number_of(image) for _, _, image in images) == [0, 1, 2, 4, 5]
        assert [other.sample_id for other in bad] in ([], [f"{server.url}/0003.png"])
        server.faults = [503] * 100
        with pytest.raises(StreamError, match="gave up"):
            streams_of(shards).take(0, [WHOLE] * 5)


@pytest.mark.parametrize("dead", ["http://127.0.0.1:9", "http://nowhere.invalid", "http://[no", 401, 451, 520])
def test_a_host_that_fails_for_good_costs_its_images_alone(tmp_path, dead):
    """It refuses connections, has no address, or answers with an error whenever it is asked; another host is well."""
    write_images(tmp_path, range(6))
    with serving(tmp_path) as server, serving(tmp_path) as other:
        other.faults = [dead] * 1000
        host = other.url if isinstance(dead, int) else dead
        shards = Shards("list:train", [f"{host if i in (1, 4) else server.url}/{i:04}.png" for i in range(6)])
        images, bad, _ = streams_of(shards).take(0, [WHOLE] * 8)
        assert {number_of(image) for _, _, image in images} == {0, 2, 3, 5}
        assert {bad.sample_id for bad in bad} == {f"{host}/{i:04}.png" for i in (1, 4)}
        assert len(other.requests) == len(bad) or dead not in (401, 451)  # which no second try changes
    with pytest.raises(StreamError, match="gave up"):  # no host answers: this is the network
        streams_of(Shards("list:train", [f"http://127.0.0.1:{port}/x.png" for port in (7, 9, 11)])).take(0, [WHOLE])


def test_what_passes_on_one_host_is_waited_for(tmp_path):
    write_images(tmp_path, range(2))
    with serving(tmp_path) as server, serving(tmp_path) as other:
        server.faults = [503, "drop", 429]
        shards = Shards("list:train", [f"{server.url}/0000.png", f"{other.url}/0001.png"])
        images, bad, _ = streams_of(shards).take(0, [WHOLE] * 2)
        assert {number_of(image) for _, _, image in images} == {0, 1} and not bad and not server.faults


def test_streaming_over_a_network_that_fails_now_and_then(tars):
    """The images are those of the files here; each failure is tried again."""
    with serving(Path(tars.locations[0]).parent) as server:
        server.faults = [503, None, "drop", 503, "drop", None, 500, "drop"] * 2
        remote = Shards(tars.name, [f"{server.url}/{i}.tar" for i in range(5)])
        assert numbers(streams_of(remote, patience=Patience(30, 0.01)), 60) == numbers(streams_of(tars), 60)
        assert server.faults == []


def test_anew_no_stream_begins_a_pass_again(tars):
    old = [streams_of(tars).deal(rank=rank, ranks=2, workers=1) for rank in range(2)]
    positions = [old[0].take(0, [WHOLE] * 30)[2].position, old[1].take(0, [WHOLE] * 20)[2].position]
    assert [position.sources[0].pass_number for position in positions] == [2, 1]
    new = streams_of(tars).deal(rank=0, ranks=1, workers=2)
    streams = new.going_on(anew([*positions, None], new))
    images, _, progress = streams.take(0, [WHOLE] * 4)
    assert progress.position.sources[0].pass_number == 3 and progress.passes == ()
    assert len({name for _, name, _ in images}) == 4


# Batches


def micro_batches(streams, **changes):
    values = dict(
        images=streams,
        draw_masks=BlockMasks(MultiBlock(grid=PatchGrid(2, 2), min_keep=1)),
        seed=3,
        image_size=8,
        crop_scale=(0.9, 1.0),
        global_batch_size=4,
        micro_batch_size=2,
    )
    return MicroBatches(**{**values, **changes})


@pytest.mark.parametrize("start", [0, 1, 3])
def test_processes_take_turns_and_go_on_from_any_step(tars, start):
    """Whatever has been read ahead: the positions of the batches taken are enough."""
    streams = streams_of(tars).deal(rank=0, ranks=1, workers=3)
    alone = list(micro_batch_stream(micro_batches(streams.going_on(None)), start_step=0, stop_step=7, workers=0))
    positions = [None] * 3
    for batch in alone[: 2 * start]:
        positions[batch.stream.number] = batch.stream.position
    assert [batch.stream.number for batch in alone[:7]] == [0, 1, 2, 0, 1, 2, 0]
    dataset = micro_batches(streams.going_on(positions))
    batches = list(micro_batch_stream(dataset, start_step=start, stop_step=7, workers=8))
    assert len(batches) == 14 - 2 * start
    for batch, expected in zip(batches, alone[2 * start :], strict=True):
        assert (batch.names, batch.indices, batch.stream) == (expected.names, expected.indices, expected.stream)
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.masks.context.indices_T, expected.masks.context.indices_T)


def test_looking_at_a_batch_moves_nothing_on(tars):
    dataset = micro_batches(streams_of(tars))
    expected = micro_batches(streams_of(tars))[0].names
    assert dataset.preview(0).images.shape == (2, 3, 8, 8)
    assert dataset.images._open == {}
    assert dataset[0].names == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_process_fails_with_reaches_the_rank(tars, tmp_path, workers):
    streams = streams_of(Shards("x:train", [str(tmp_path / "gone.tar")]))
    batches = micro_batch_stream(micro_batches(streams), start_step=0, stop_step=2, workers=workers)
    with pytest.raises(LoadError, match=r"^\S+gone.tar cannot be opened: No such file or directory; bring it back$"):
        next(batches)
    assert not multiprocessing.active_children()  # although the error holds on to what started them


def test_a_url_that_is_signed_anew_is_the_same_shard():
    def digest(*urls):
        return streams_of(Shards("x:train", list(urls))).digest

    first = digest("https://a.b/0.tar?signature=1", "https://a.b/1.tar?signature=1")
    assert digest("https://a.b/0.tar?signature=2", "https://a.b/1.tar") == first
    assert digest("https://me:secret@a.b/0.tar", "https://me:another@a.b/1.tar") == first
    assert digest("https://me:p@ss@a.b/0.tar", "https://me:w@rd@a.b/1.tar") == first
    assert digest("https://a.b/0.tar", "https://a.b/2.tar") != first


def test_names_hold_no_secret_stay_as_they_are_when_recorded_and_tell_images_apart(tmp_path):
    """Of a list of URLs, of images in a tar and of the tar's damaged rest, whichever rank reads them."""
    write_images(tmp_path, range(2))
    (tmp_path / "bad.png").write_bytes(b"no image")
    write_tar(tmp_path / "x.tar", range(8))
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:-15_000])

    def names(locations, count, rank=0, ranks=1):
        streams = streams_of(Shards("a:train", locations)).deal(rank=rank, ranks=ranks, workers=0)
        images, bad, _ = streams.take(0, [WHOLE] * count)
        return {name for _, name, _ in images} | {other.sample_id for other in bad}

    with serving(tmp_path) as server:
        host = server.url.replace("http://", "http://me:p4ss@w0rd@")
        files = ["0000.png", "bad.png", "bad.png", "0000.png", "0000.png"]
        links = [f"{host}/{file}?id={i}&signature=s1gn" for i, file in enumerate(files)]
        of_links = names(links, 6)
        of_ranks = [names(links, 4, rank, ranks=2) for rank in range(2)]
        of_tars = names([f"{host}/x.tar?id={i}&signature=s1gn" for i in range(2)], 12)
    shown = server.url.replace("http://", "http://[hidden]@")
    assert of_links == {f"{shown}/{file}?[hidden]#{i}" for i, file in enumerate(files)}
    assert of_ranks == [{name for name in of_links if int(name[-1]) % 2 == rank} for rank in range(2)]
    assert {f"x.tar?[hidden]#{i}[0] 0000.png" for i in range(2)} < of_tars
    assert {f"{shown}/x.tar?[hidden]#{i}" for i in range(2)} < of_tars  # whose rest is damaged
    assert all(without_secrets(name) == name for name in of_links | of_tars)
