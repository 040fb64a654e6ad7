import math
from fractions import Fraction

import datasets
import numpy as np
import pytest

from ijepa_scale.data.collate import MicroBatches
from ijepa_scale.data.images import open_images
from ijepa_scale.data.mixture import Mixture
from ijepa_scale.data.order import mixed_image_at, mixture_turn, permuted_index, source_seed, whole_weights
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.multiblock import MultiBlock
from ijepa_scale.objectives.masks import BlockMasks
from tests.data.small_sources import WHOLE, number_of, write_images

WEIGHTS = [(1,), (1, 1), (3, 1), (1, 3), (2, 3, 5), (1, 1, 1, 1), (1, 999), (999, 1), (7, 1, 2, 90)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_places_are_counted_up_and_even(weights):
    """Against a count; every prefix has each source within an image or two of its share."""
    bound = max(1, math.ceil(math.log2(len(weights))))
    counts = [0] * len(weights)
    for n in range(2 * sum(weights) + 100):
        source, place = mixture_turn(n, weights)
        assert place == counts[source]
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - Fraction((n + 1) * weight, sum(weights))) < bound
    assert [mixture_turn(n, weights)[0] for n in range(sum(weights))].count(0) == weights[0]


def test_places_are_exact_far_out():
    """Also where floats are not: the counts of a period after 10^15 images are the weights."""
    weights = (3, 7, 1)
    start = 10**15 + 7
    seen = [mixture_turn(n, weights) for n in range(start, start + 11)]
    assert [[s for s, _ in seen].count(source) for source in range(3)] == [3, 7, 1]
    for source in range(3):
        places = [place for s, place in seen if s == source]
        assert places == list(range(places[0], places[0] + weights[source]))
        assert abs(places[0] - Fraction(start * weights[source], 11)) < 2


def test_weights_as_whole_numbers():
    assert whole_weights([3, 1]) == (3, 1)
    assert whole_weights([0.1, 0.2]) == (1, 2)
    assert whole_weights([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert whole_weights([4, 2.0]) == (2, 1)
    assert whole_weights([1e-3]) == (1,)


def test_each_source_goes_through_epochs_of_its_own():
    sizes, weights = (5, 11), (1, 2)
    seen = [mixed_image_at(n, seed=9, sizes=sizes, weights=weights) for n in range(99)]
    for source in range(2):
        own = [index for s, index in seen if s == source]
        for epoch in range(len(own) // sizes[source]):
            part = own[epoch * sizes[source] : (epoch + 1) * sizes[source]]
            assert part == [
                permuted_index(source_seed(9, source), epoch, sizes[source], i) for i in range(sizes[source])
            ]
            assert sorted(part) == list(range(sizes[source]))
    equal = [mixed_image_at(n, seed=9, sizes=(50, 50), weights=(1, 1)) for n in range(100)]
    assert [i for s, i in equal if s == 0] != [i for s, i in equal if s == 1]


def test_seeds_of_sources():
    seeds = [
        source_seed(seed, source, *key) for seed in range(3) for source in range(3) for key in [(), (0, 0), (0, 1)]
    ]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert source_seed(5, 0) == 5


@pytest.fixture
def mixture(tmp_path):
    first = open_images(str(write_images(tmp_path / "a", range(4))))
    (tmp_path / "b").mkdir()
    write_images(tmp_path / "b", range(10, 16))
    (tmp_path / "b/0012.png").write_bytes(b"bad")
    return Mixture((first, open_images(str(tmp_path / "b"))), (3, 1))


def test_a_mixture_reads_its_parts_end_to_end(mixture):
    assert len(mixture) == 10 and mixture.name == "75% a:train + 25% b:train"
    whole = [mixture.crop_or_substitute(i, WHOLE) for i in range(10)]
    assert [number_of(image) for image, _ in whole[:4]] == [0, 1, 2, 3]
    assert [number_of(image) for image, _ in whole[4:]][:2] == [10, 11]
    ((bad,),) = [bad for _, bad in whole if bad]
    assert bad.index == 6 and bad.sample_id.endswith("0012.png") and number_of(whole[6][0]) >= 10
    assert mixture.sample_id(9).endswith("b/0015.png")


def test_a_batch_of_a_mixture(mixture):
    assert datasets.__name__  # imported here, not while a batch is timed
    batches = MicroBatches(
        images=mixture,
        draw_masks=BlockMasks(MultiBlock(grid=PatchGrid(2, 2), min_keep=1)),
        seed=3,
        image_size=8,
        crop_scale=(0.9, 1.0),
        global_batch_size=8,
        micro_batch_size=8,
    )
    for step in range(3):
        indices = batches[step].indices
        assert sum(index >= 4 for index in indices) == 2
        for position, index in enumerate(indices):
            source, own = mixed_image_at(8 * step + position, seed=3, sizes=(4, 6), weights=(3, 1))
            assert index == own + 4 * source
    halves = [
        MicroBatches(**{**batches.__dict__, "micro_batch_size": 4, "rank": rank, "ranks": 2})[1] for rank in range(2)
    ]
    assert halves[0].indices + halves[1].indices == batches[1].indices
    assert np.array_equal(np.concatenate([half.images for half in halves]), batches[1].images)
