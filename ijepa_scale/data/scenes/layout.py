"""What a scene shows, drawn from a seed and an index: three to ten solids on a ground plane, and their look."""

import colorsys
import math
from dataclasses import dataclass

import numpy as np

from ijepa_scale.data.scenes.raycast import HALF_VIEW, Layout, Look, pixel_rays, render, trace

COUNTS = range(3, 11)
DISTANCE_BIN_EDGES: tuple[float, ...] = (6.8, 7.5, 8.15, 8.8, 9.5)  # the sixths of 20,000 scenes, rounded
KINDS = ("sphere", "box", "cylinder", "cone")
TEXTURES = ("gradient", "stripes", "checker", "tiles", "noise", "blotches")
MIN_VISIBLE_SHARE = 0.45  # of an object's own outline inside the frame
MIN_VISIBLE_AREA = 0.003  # of the image: 12 pixels at 64 x 64
VERSION = 1  # of what is drawn: raise it whenever a rendered pixel or a label changes
VISIBILITY_SIZE = 64  # layouts are judged at one resolution, so that a scene is the same scene at any image size


@dataclass(frozen=True)
class Scene:
    """A picture and the exact answers to two questions about it."""

    image: np.ndarray  # (size, size, 3) uint8 RGB
    count: int  # of objects, all of them visible
    distance: float  # from the camera to the nearest centre of an object, in scene units (objects are 0.5 to 1.6 wide)


def render_scene(seed: int, index: int, size: int) -> Scene:
    """Scene `index` of series `seed` (both 0 <= x < 2^64) at size x size pixels: a pure function of its arguments.

    Layout and labels do not depend on the size.
    """
    rng = _generator(seed, index)
    layout = _draw_layout(rng)
    image = render(layout, _draw_look(rng, len(layout.kinds)), size)
    return Scene(image, len(layout.kinds), layout.distance)


def scene_layout(seed: int, index: int) -> Layout:
    """The geometry that `render_scene(seed, index, size)` shows."""
    return _draw_layout(_generator(seed, index))


def distance_bin(distance: float) -> int:
    """Class 0 to 5 of a distance: the number of edges at or below it."""
    return sum(edge <= distance for edge in DISTANCE_BIN_EDGES)


def _generator(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def _draw_layout(rng: np.random.Generator) -> Layout:
    """Draws until every object can be seen. The count is drawn once, so that all counts are equally frequent."""
    count = int(rng.integers(COUNTS.start, COUNTS.stop))
    while True:
        layout = _draw_objects(rng, count, *_draw_camera(rng))
        if layout is not None and _all_visible(layout):
            return layout


def _draw_camera(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    elevation, azimuth = math.radians(rng.uniform(17, 50)), rng.uniform(0, 2 * math.pi)
    outward = np.array([math.cos(azimuth), math.sin(azimuth), math.tan(elevation)]) * math.cos(elevation)
    right = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0])
    up = np.cross(outward, right)
    roll = rng.normal(0, math.radians(2))
    right, up = right * math.cos(roll) + up * math.sin(roll), up * math.cos(roll) - right * math.sin(roll)
    target = np.array([*rng.uniform(-0.4, 0.4, 2), rng.uniform(0.0, 0.8)])
    return target + outward * rng.uniform(8.0, 12.0), np.stack([-outward, right, up])


def _draw_objects(rng: np.random.Generator, count: int, camera: np.ndarray, view: np.ndarray) -> Layout | None:
    """Random shapes, apart on the ground and not quite behind one another; None if random places leave no room."""
    kinds = tuple(KINDS[k] for k in rng.integers(0, len(KINDS), count))
    radii = rng.uniform(0.4, 0.8, count)
    axes_K33 = np.stack([_draw_axes(rng, kind, radius) for kind, radius in zip(kinds, radii, strict=True)])
    rest_K = np.abs(axes_K33[:, 2]).max(
        axis=1
    )  # the length of the one vertical axis: on the ground, the centre's height
    angle, reach = rng.uniform(0, 2 * math.pi, 120), 3.6 * np.sqrt(rng.random(120))
    places = np.stack([reach * np.cos(angle), reach * np.sin(angle)], axis=1)
    depth, x, y = view @ (np.c_[places, np.full(120, 0.5)] - camera).T
    screen = np.stack([x, y], axis=1) / depth[:, None]
    room = np.abs(screen).max(axis=1) < 0.82 * HALF_VIEW
    room_K = np.tile(room, (count, 1))
    centres_K3 = np.empty((count, 3))
    for k in range(count):
        if not room_K[k].any():
            return None
        place = int(room_K[k].argmax())
        centres_K3[k] = *places[place], rest_K[k]
        apart, seen = np.hypot(*(places - places[place]).T), np.hypot(*(screen - screen[place]).T)
        sums = radii[:, None] + radii[k]
        room_K &= apart > 1.12 * sums + 0.05
        room_K &= seen > 0.6 * (radii[:, None] / depth + radii[k] / depth[place])
    return Layout(kinds, centres_K3, axes_K33, camera, view)


def _draw_axes(rng: np.random.Generator, kind: str, radius: float) -> np.ndarray:
    """(3, 3) matrix of one unit shape: width and height of the kind, turned about the vertical; a cylinder may lie."""
    yaw = rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(yaw), -math.sin(yaw), 0.0], [math.sin(yaw), math.cos(yaw), 0.0], [0.0, 0.0, 1.0]])
    if kind == "cylinder" and rng.random() < 0.4:
        turn = turn[:, [1, 2, 0]]
    width = {"sphere": 1.0, "box": 0.78, "cylinder": 0.72, "cone": 0.95}[kind]
    height = 1.0 if kind == "sphere" else rng.uniform(0.6, 0.92)
    return turn * radius * np.array([width, width, height])


def _all_visible(layout: Layout) -> bool:
    _, owner, outlines = trace(layout, pixel_rays(VISIBILITY_SIZE, 1))
    seen = np.bincount(owner[owner >= 0], minlength=len(outlines))
    return bool((seen >= np.maximum(MIN_VISIBLE_SHARE * outlines, MIN_VISIBLE_AREA * owner.size)).all())


def _draw_look(rng: np.random.Generator, count: int) -> Look:
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    sky = [_draw_colour(rng, saturation=(0.0, 0.6), value=(0.5, 1.0)) for _ in range(2)]
    ground = [_draw_colour(rng, saturation=(0.0, 0.7), value=(0.3, 0.95)) for _ in range(2)]
    ground[1] = ground[0] + (ground[1] - ground[0]) * rng.uniform(0.25, 0.9)  # some textures faint
    pairs = [[_draw_colour(rng, saturation=(0.2, 1.0), value=(0.3, 1.0)) for _ in range(2)] for _ in range(count)]
    albedo = np.array([pair if rng.random() < 0.2 else [pair[0], pair[0]] for pair in pairs])
    stripes = np.concatenate([rng.normal(0, 4.0, (count, 3)), rng.uniform(0, 6.3, (count, 1))], axis=1)
    shiny, metal = rng.random(count) < 0.6, rng.random(count) < 0.25
    mirror = np.where(metal, rng.uniform(0.5, 0.8, count), np.where(shiny, 0.05, 0.0))
    polish = np.where(shiny | metal, rng.uniform(25, 120, count), 4.0)
    warmth = rng.uniform(-0.1, 0.1)
    parts = {
        "lights": _draw_lights(rng), "sun": rng.uniform(0.9, 1.5) * np.array([1 + warmth, 1, 1 - warmth]),
        "zenith": sky[0], "horizon": sky[1], "ground": ground, "waves": _draw_waves(rng, texture),
        "albedo": albedo, "stripes": stripes, "mirror": mirror, "polish": polish,
    }  # fmt: skip
    arrays = {name: np.asarray(value, dtype=np.float32) for name, value in parts.items()}
    return Look(texture=texture, fog=float(rng.uniform(0.0, 0.05)), **arrays)


def _draw_colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """Linear RGB of any hue; the square undoes the display's gamma of about 2."""
    return np.square(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)))


def _draw_lights(rng: np.random.Generator) -> np.ndarray:
    elevation, azimuth, spread = math.radians(rng.uniform(32, 70)), rng.uniform(0, 2 * math.pi), rng.uniform(0.01, 0.05)
    sun = np.array([math.cos(azimuth), math.sin(azimuth), math.tan(elevation)]) * math.cos(elevation)
    across = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0])
    offsets = np.outer([-1, -1, 1, 1], across) + np.outer([-1, 1, -1, 1], np.cross(sun, across))
    lights = sun + spread * offsets
    return (lights / np.linalg.norm(lights, axis=1, keepdims=True)).T


def _draw_waves(rng: np.random.Generator, texture: str) -> np.ndarray:
    """Four plane waves over the ground, in radians a scene unit; the first two are perpendicular and of one length."""
    low, high = {"gradient": (0.1, 0.4), "noise": (0.7, 3.0), "blotches": (0.7, 3.0)}.get(texture, (1.5, 4.0))
    angle = rng.uniform(0, 2 * math.pi) + np.array([0, math.pi / 2, *rng.uniform(0, 2 * math.pi, 2)])
    length = np.repeat(rng.uniform(low, high, 3), [2, 1, 1])
    return np.stack([length * np.cos(angle), length * np.sin(angle), rng.uniform(0, 2 * math.pi, 4)], axis=1)
