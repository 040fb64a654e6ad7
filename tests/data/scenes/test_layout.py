import math

import numpy as np
import pytest
from PIL import Image

from ijepa_scale.data.scenes import layout
from tests.reference.marching import INSIDE, marched, nearest

SCENES = [(0, 0), (0, 9), (4, 1), (4, 1 << 40)]


@pytest.mark.parametrize("seed, index", SCENES)
def test_labels_are_the_visible_objects_and_the_nearest_centre(seed, index):
    scene, drawn, depth = layout.render_scene(seed, index, 16), layout.scene_layout(seed, index), marched(seed, index)
    visible = np.array([(nearest(depth) == k).sum() for k in range(len(depth))])
    assert scene.count == len(visible)
    assert (visible >= 0.4 * np.isfinite(depth).sum(axis=(1, 2))).all()
    assert (visible >= 10).all()
    assert scene.distance == pytest.approx(min(math.dist(centre, drawn.camera) for centre in drawn.centres))


def test_objects_stand_on_the_ground_and_apart():
    rng = np.random.default_rng(0)
    for index in range(20):
        drawn = layout.scene_layout(1, index)
        unit = rng.uniform(-1, 1, (20000, 3)).T
        solids = []
        for kind, centre, axes in zip(drawn.kinds, drawn.centres, drawn.axes, strict=True):
            inside = unit[:, INSIDE[kind](*unit)]
            solids.append(centre[:, None] + axes @ inside)
            assert 0 <= solids[-1][2].min() < 0.06
        for k, (kind, centre, axes) in enumerate(zip(drawn.kinds, drawn.centres, drawn.axes, strict=True)):
            others = np.concatenate(solids[:k] + solids[k + 1 :], axis=1)
            assert not INSIDE[kind](*np.linalg.solve(axes, others - centre[:, None])).any()


def test_scene_depends_on_its_arguments_only():
    first = layout.render_scene(3, 5, 33)
    layout.render_scene(8, 8, 16)
    again = layout.render_scene(3, 5, 33)
    assert first.image.shape == (33, 33, 3) and first.image.dtype == np.uint8
    assert (first.image == again.image).all() and (first.count, first.distance) == (again.count, again.distance)
    for other in [(3, 6), (4, 5), (5, 3), (3, 5 + 1 << 40)]:
        assert np.abs(layout.render_scene(*other, 33).image.astype(float) - first.image).mean() > 5


@pytest.mark.parametrize("size", [9, 33, 50])
def test_other_sizes_show_the_same_scene(size):
    large, small = layout.render_scene(2, 7, 4 * size), layout.render_scene(2, 7, size)
    shrunk = np.asarray(Image.fromarray(large.image).resize((size, size), Image.Resampling.BOX))
    assert (small.count, small.distance) == (large.count, large.distance)
    assert np.abs(shrunk.astype(float) - small.image).mean() < 6


def test_all_counts_and_distance_classes_are_about_equally_frequent():
    layouts = [layout.scene_layout(11, index) for index in range(800)]
    counts = np.bincount([len(drawn.kinds) for drawn in layouts], minlength=11)
    bins = np.bincount([layout.distance_bin(drawn.distance) for drawn in layouts], minlength=6)
    assert counts[:3].sum() == 0 and counts[3:].min() > 70 and counts[3:].max() < 130  # 100 expected, deviation 9
    assert len(bins) == 6 and bins.min() > 95 and bins.max() < 175  # 133 expected, deviation 11


def test_distance_bin_counts_the_edges_at_or_below():
    assert [layout.distance_bin(edge) for edge in layout.DISTANCE_BIN_EDGES] == [1, 2, 3, 4, 5]
    assert [layout.distance_bin(edge - 1e-6) for edge in layout.DISTANCE_BIN_EDGES] == [0, 1, 2, 3, 4]


def test_mean_colour_does_not_tell_the_count():
    drawn = [layout.render_scene(12, index, 12) for index in range(500)]
    features = np.array([scene.image.mean(axis=(0, 1)) for scene in drawn])
    counts = np.array([scene.count for scene in drawn], dtype=float)
    inputs = np.c_[features, np.ones(len(features))]
    fit = inputs @ np.linalg.lstsq(inputs, counts, rcond=None)[0]
    assert 1 - ((counts - fit) ** 2).mean() / counts.var() < 0.08
