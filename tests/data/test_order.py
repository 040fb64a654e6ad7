import collections
import itertools
import math

import numpy as np
import pytest

from ijepa_scale.data.order import generator_for, image_at, permuted_index

PINNED_ORDER = [0, 7, 3, 1, 5, 8, 9, 2, 4, 6]
PINNED_IMAGENET = [319640, 109502, 818214]
PINNED_DRAWS = [0.14516062887988235, 0.49703205536872086]
PINNED_RAW = [9168623121816630863, 17130011978515719214]


def permutation(seed, epoch, num_images):
    return [permuted_index(seed, epoch, num_images, index) for index in range(num_images)]


@pytest.mark.parametrize("num_images", [1, 2, 3, 7, 64, 65, 100, 1000, 4097])
def test_an_epoch_is_a_permutation(num_images):
    for epoch in range(3):
        assert sorted(permutation(5, epoch, num_images)) == list(range(num_images))


def test_epochs_and_seeds_differ():
    orders = [tuple(permutation(seed, epoch, 100)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == len(orders)
    # As many places agree between two random orders as chance has it: one on average.
    agreements = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in itertools.combinations(orders, 2)]
    assert max(agreements) <= 6


@pytest.mark.parametrize("num_images", [2, 3, 4])
def test_every_order_is_equally_likely(num_images):
    orders = math.factorial(num_images)
    counts = collections.Counter(tuple(permutation(0, epoch, num_images)) for epoch in range(200 * orders))
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values()) + 200 * (orders - len(counts))
    assert chi_square < (orders - 1) + 5 * math.sqrt(2 * (orders - 1))


def test_large_orders_look_random():
    num_images, epochs = 1000, 40
    orders = np.array([permutation(1, epoch, num_images) for epoch in range(epochs)])
    fixed_points = (orders == np.arange(num_images)).sum(1).mean()
    neighbours_stay_neighbours = (np.abs(np.diff(orders, axis=1)) == 1).sum(1).mean()
    assert abs(fixed_points - 1) < 5 / math.sqrt(epochs)
    assert abs(neighbours_stay_neighbours - 2) < 5 * math.sqrt(2 / epochs)
    assert abs(np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]) < 0.03
    # Where one image goes, over epochs: every quarter of the order as often.
    quarters = np.bincount([permuted_index(1, epoch, num_images, 17) // 250 for epoch in range(2000)], minlength=4)
    assert np.abs(quarters - 500).max() < 5 * math.sqrt(2000 * 3 / 16)


def test_a_billion_images_need_no_list():
    places = {permuted_index(0, 0, 10**9 + 7, index) for index in range(0, 10**9, 10**6)}
    assert len(places) == 1000 and max(places) < 10**9 + 7


def test_pinned_values():
    """A change here changes what every old run trains on, and breaks resuming it."""
    assert permutation(0, 0, 10) == PINNED_ORDER
    assert [permuted_index(7, 3, 1_281_167, index) for index in (0, 1, 1_281_166)] == PINNED_IMAGENET
    assert generator_for(0).random() == PINNED_DRAWS[0]
    assert generator_for(1, 2, 3).random() == PINNED_DRAWS[1]
    raw = generator_for(1, 2, 3).bit_generator.random_raw(2).tolist()
    assert raw == PINNED_RAW


@pytest.mark.parametrize("num_images, global_batch_size", [(10, 3), (12, 4), (5, 5), (1, 1)])
def test_batches_walk_through_each_epoch_once(num_images, global_batch_size):
    steps = num_images // global_batch_size
    expected = [
        permutation(9, epoch, num_images)[start : start + global_batch_size]
        for epoch in range(3)
        for start in range(0, steps * global_batch_size, global_batch_size)
    ]
    actual = [
        [
            image_at(9, step, position, num_images=num_images, global_batch_size=global_batch_size)
            for position in range(global_batch_size)
        ]
        for step in range(3 * steps)
    ]
    assert actual == expected
    for epoch in range(3):
        seen = list(itertools.chain(*actual[epoch * steps : (epoch + 1) * steps]))
        assert len(set(seen)) == steps * global_batch_size


def test_bad_positions_are_refused():
    with pytest.raises(ValueError, match="global batch of 11 images is larger than the data set of 10"):
        image_at(0, 0, 0, num_images=10, global_batch_size=11)
    for step, position in [(-1, 0), (0, -1), (0, 4)]:
        with pytest.raises(ValueError, match=r"positions are 0\.\.3"):
            image_at(0, step, position, num_images=10, global_batch_size=4)
    for num_images, index in [(0, 0), (3, 3), (3, -1)]:
        with pytest.raises(ValueError, match=f"index {index} is outside"):
            permuted_index(0, 0, num_images, index)


def test_a_generator_depends_on_all_of_its_key_and_on_nothing_else():
    keys = [(), (0,), (0, 0), (1,), (1, 0), (0, 1), (1, 2), (2, 1), (1, 2, 3), (256,), (2**40,), (2**62, 1)]
    draws = {(seed, *key): generator_for(seed, *key).random() for seed in (0, 1) for key in keys}
    assert len(set(draws.values())) == len(draws)
    np.random.seed(3)
    assert all(generator_for(*key).random() == draw for key, draw in draws.items())
    assert generator_for(np.int64(1), np.int32(0)).random() == draws[1, 0]


def test_streams_of_neighbouring_keys_are_independent():
    draws = np.array([[generator_for(0, step, i).random() for i in range(40)] for step in range(40)])
    more = np.array([generator_for(0, 0, i).random(400) for i in range(40)])
    assert abs(draws.mean() - 0.5) < 5 / math.sqrt(12 * 1600)
    assert abs(np.corrcoef(draws[:, :-1].ravel(), draws[:, 1:].ravel())[0, 1]) < 5 / math.sqrt(1560)
    correlations = np.corrcoef(more)[np.triu_indices(40, 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(400)
