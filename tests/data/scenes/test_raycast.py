import dataclasses

import numpy as np
import pytest

from ijepa_scale.data.scenes import layout as draw
from ijepa_scale.data.scenes import raycast
from tests.reference.marching import INSIDE, SIZE, STEP, marched, nearest

SCENES = [(0, 0), (0, 9), (4, 1), (4, 1 << 40)]


def without_sun(look: raycast.Look) -> raycast.Look:
    """Black objects, and everything else lit from all sides."""
    grey = np.full_like(look.ground, 0.8)
    return dataclasses.replace(look, sun=0 * look.sun, albedo=0 * look.albedo, mirror=0 * look.mirror, ground=grey)


@pytest.mark.parametrize("seed, index", SCENES)
def test_rays_hit_what_small_steps_along_them_hit(seed, index):
    expected = marched(seed, index)
    depth, owner, outlines = raycast.trace(draw.scene_layout(seed, index), raycast.pixel_rays(SIZE, 1))
    agrees = owner[0] == nearest(expected)
    assert agrees.mean() > 0.99  # a step may jump over a grazed edge
    shown = agrees & (owner[0] >= 0)
    assert np.abs(depth[0][shown] - expected.min(axis=0)[shown]).max() < 1.5 * STEP
    np.testing.assert_allclose(outlines, np.isfinite(expected).sum(axis=(1, 2)), rtol=0.05, atol=4)


@pytest.mark.parametrize("kind", draw.KINDS)
def test_crossing_is_the_part_of_a_ray_inside_the_shape(kind):
    rng = np.random.default_rng(1)
    starts, targets = rng.normal(size=(3, 600)), rng.uniform(-1.2, 1.2, (3, 600))
    starts *= 4 / np.linalg.norm(starts, axis=0)  # all around, so that cones are also seen from above and below
    times = np.linspace(0, 2.5, 2501)
    t_in, t_out = raycast._crossing(kind, starts, targets - starts)
    for ray, (start, target) in enumerate(zip(starts.T, targets.T, strict=True)):
        inside = times[INSIDE[kind](*(start + times[:, None] * (target - start)).T)]
        if len(inside) > 1:
            assert (t_in[ray], t_out[ray]) == pytest.approx((inside[0], inside[-1]), abs=0.0011)
        else:
            assert not t_out[ray] - t_in[ray] > 0.0021


def test_looking_only_where_an_object_or_its_shadow_can_be_changes_nothing(monkeypatch):
    layouts = [draw.scene_layout(4, index) for index in range(12)]
    looks = [draw._draw_look(np.random.default_rng(index), len(layout.kinds)) for index, layout in enumerate(layouts)]
    images = [raycast.render(*scene, SIZE) for scene in zip(layouts, looks, strict=True)]
    everywhere = (slice(None), slice(None), slice(None))
    monkeypatch.setattr(raycast, "_windows", lambda layout, points, size: [everywhere] * len(layout.kinds))
    for image, layout, look in zip(images, layouts, looks, strict=True):
        difference = np.abs(image.astype(int) - raycast.render(layout, look, SIZE))
        assert (difference > 3).sum() <= 3  # a sample on an edge may fall to either side: products are summed otherwise


@pytest.mark.parametrize("seed, index", SCENES)
def test_picture_shows_the_objects_of_the_layout_where_they_are(seed, index):
    layout = draw.scene_layout(seed, index)
    look = without_sun(draw._draw_look(np.random.default_rng(0), len(layout.kinds)))
    black = raycast.render(layout, look, SIZE).max(axis=-1) == 0
    expected = nearest(marched(seed, index)) >= 0
    inner = expected.copy()  # pixels whose neighbours agree: the others are part object, part ground
    outer = expected.copy()
    for shift in [(0, 1), (0, -1), (1, 0), (-1, 0)]:
        inner &= np.roll(expected, shift, axis=(0, 1))
        outer |= np.roll(expected, shift, axis=(0, 1))
    assert black[inner].mean() > 0.99
    assert not black[~outer].any()
    assert inner.sum() > 50


def test_shadow_falls_away_from_the_sun():
    centre = np.array([[0.0, 0.0, 1.5]])  # a ball in the air, seen from above: its shadow is beside it
    view = np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    layout = raycast.Layout(("sphere",), centre, 0.5 * np.eye(3)[None], np.array([0.0, 0.0, 10.0]), view)
    look = draw._draw_look(np.random.default_rng(0), 1)
    grey, sun = np.full_like(look.ground, 0.5), np.array([0.6, 0.0, 0.8], dtype=np.float32)
    look = dataclasses.replace(look, ground=grey, fog=0.0, lights=np.stack([sun] * 4, axis=1))
    image = raycast.render(layout, look, 65).astype(float).mean(axis=-1)

    def pixel(x: float, y: float) -> float:
        return image[round(32 - y / 10 / raycast.HALF_VIEW * 32.5), round(32 + x / 10 / raycast.HALF_VIEW * 32.5)]

    shadow = -1.5 * 0.6 / 0.8  # x of the shadow's centre; it reaches 0.5 in y
    assert pixel(shadow - 0.2, 0) < 0.75 * pixel(-shadow + 0.2, 0)
    assert pixel(shadow - 0.2, 0.3) < 0.75 * pixel(-shadow + 0.2, 0)
    assert pixel(shadow - 0.2, 0.8) == pytest.approx(pixel(-shadow + 0.2, 0.8), abs=1)
