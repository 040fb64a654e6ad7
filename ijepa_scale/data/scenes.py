"""Rendered scenes with exact labels: the data of configs/tiny.yaml, and a test bed whose answers are known.

Three to ten spheres, boxes, cylinders and cones on a ground plane, in the spirit of CLEVR (arXiv:1612.06890), ray-cast
in NumPy. In this order: what a scene is; drawing one; its geometry; its colours; the Parquet files.
Letters: K objects, S samples in a pixel, H and W pixels, M samples that show an object.
"""

import colorsys
import fcntl
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

COUNTS = range(3, 11)
DISTANCE_BIN_EDGES: tuple[float, ...] = (6.8, 7.5, 8.15, 8.8, 9.5)  # the sixths of 20,000 scenes, rounded
KINDS = ("sphere", "box", "cylinder", "cone")
TEXTURES = ("gradient", "stripes", "checker", "tiles", "noise", "blotches")
MIN_VISIBLE_SHARE = 0.45  # of an object's own outline inside the frame
MIN_VISIBLE_AREA = 0.003  # of the image: 12 pixels at 64 x 64
VALIDATION_START = 1 << 40  # index of the first validation scene: the same scenes for any num_train
VERSION = 1  # part of the folder's name: raise it whenever a rendered pixel or a label changes
HALF_VIEW = math.tan(math.radians(21))  # fixed: with a free zoom the image would not tell the distance
VISIBILITY_SIZE = 64  # layouts are judged at one resolution, so that a scene is the same scene at any image size
UNIT_CORNERS = np.indices((2, 2, 2)).reshape(3, 8) * 2.0 - 1
SCENES_PER_SHARD, SCENES_PER_TASK = 1000, 50


Row = tuple[bytes, int, float]  # PNG, count, distance


@dataclass(frozen=True)
class Scene:
    """A picture and the exact answers to two questions about it."""

    image: np.ndarray  # (size, size, 3) uint8 RGB
    count: int  # of objects, all of them visible
    distance: float  # from the camera to the nearest centre of an object, in scene units (objects are 0.5 to 1.6 wide)


@dataclass(frozen=True)
class Layout:
    """Where everything is, float64. World axes: z is up, the ground is z = 0.

    Object k is a unit shape placed at `centres[k] + axes[k] @ p`, with p in: sphere |p| <= 1; box |p_i| <= 1;
    cylinder x^2 + y^2 <= 1 and |z| <= 1; cone x^2 + y^2 <= ((1 - z) / 2)^2 and |z| <= 1.
    The point (u, v) of the image, u rightward and v upward in [-HALF_VIEW, HALF_VIEW], looks along view.T @ (1, u, v).
    """

    kinds: tuple[str, ...]
    centres: np.ndarray  # (K, 3)
    axes: np.ndarray  # (K, 3, 3)
    camera: np.ndarray  # (3,) position
    view: np.ndarray  # (3, 3) orthonormal rows: forward, right, up

    @functools.cached_property
    def to_unit(self) -> np.ndarray:
        return np.linalg.inv(self.axes)

    @property
    def distance(self) -> float:
        return float(np.linalg.norm(self.centres - self.camera, axis=1).min())


@dataclass(frozen=True)
class Look:
    """Colours (linear RGB), materials and light, float32."""

    lights: np.ndarray  # (3, S) unit vectors to the sun, one for each sample in a pixel: their spread softens shadows
    sun: np.ndarray  # (3,), as the next two
    zenith: np.ndarray
    horizon: np.ndarray
    ground: np.ndarray  # (2, 3) the two colours of the ground texture
    texture: str
    waves: np.ndarray  # (4, 3) wave vector and phase of the plane waves that the texture is made of
    fog: float  # share of light lost in a scene unit
    albedo: np.ndarray  # (K, 2, 3) two colours of each object
    stripes: np.ndarray  # (K, 4) wave vector and phase, in unit-shape space, by which they alternate
    mirror: np.ndarray  # (K,) share of light reflected head-on
    polish: np.ndarray  # (K,) exponent of the highlight


def render_scene(seed: int, index: int, size: int) -> Scene:
    """Scene `index` of series `seed` (both 0 <= x < 2^64) at size x size pixels: a pure function of its arguments.

    Layout and labels do not depend on the size.
    """
    rng = _generator(seed, index)
    layout = _draw_layout(rng)
    image = _render(layout, _draw_look(rng, len(layout.kinds)), size)
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
    _, owner, outlines = _trace(layout, _pixel_rays(VISIBILITY_SIZE, 1))
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


@functools.lru_cache(maxsize=8)
def _pixel_rays(size: int, side: int) -> np.ndarray:
    """(3, side^2, size, size) float32: (1, u, v) of side x side samples in each pixel; row 0 is the top."""
    within = (np.arange(side) + 0.5) / side
    pixel = (np.arange(size)[None] + within[:, None]) / size * 2 - 1
    u_SHW = np.broadcast_to(pixel[None, :, None, :], (side, side, size, size))
    v_SHW = np.broadcast_to(-pixel[:, None, :, None], (side, side, size, size))
    rays = np.stack([np.ones_like(u_SHW), HALF_VIEW * u_SHW, HALF_VIEW * v_SHW]).astype(np.float32)
    rays = rays.reshape(3, side * side, size, size)
    rays.flags.writeable = False
    return rays


def _windows(layout: Layout, points_KN3: np.ndarray, size: int) -> list[tuple[slice, slice, slice]]:
    """For each object, the part of an (S, H, W) array that shows the hull of its points; all if some are behind us."""
    depth, x, y = np.moveaxis((points_KN3 - layout.camera) @ layout.view.T, -1, 0)
    screen = np.stack([-y, x]) / (depth * HALF_VIEW)
    extremes = np.stack([screen.min(axis=2), screen.max(axis=2)])
    low, high = np.clip((extremes + 1) / 2 * size, 0, size).astype(int).transpose(0, 2, 1).tolist()
    everywhere = slice(None)
    return [
        (everywhere, slice(top, bottom + 1), slice(left, right + 1)) if ahead else (everywhere,) * 3
        for (top, left), (bottom, right), ahead in zip(low, high, (depth > 0.1).all(axis=1), strict=True)
    ]


def _corners(layout: Layout, reach: float = 1.0) -> np.ndarray:
    """(K, 8, 3) corners of the boxes around all objects, `reach` times as large."""
    return layout.centres[:, None] + (layout.axes @ (reach * UNIT_CORNERS)).transpose(0, 2, 1)


@np.errstate(all="ignore")  # rays along a face divide by 0; rays that miss take roots of negative numbers
def _crossing(kind: str, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays o + t d (components first) enter and leave a unit shape: (t_in, t_out); a ray hits if t_in < t_out."""
    if kind == "sphere":
        a, b, c = (d * d).sum(axis=0), (o * d).sum(axis=0), (o * o).sum(axis=0) - 1
        root = np.sqrt(b * b - a * c)
        return (-b - root) / a, (-b + root) / a
    slabs = slice(0, 3) if kind == "box" else slice(2, 3)
    first, last = (-1 - o[slabs]) / d[slabs], (1 - o[slabs]) / d[slabs]
    t_in, t_out = np.minimum(first, last).max(axis=0), np.maximum(first, last).min(axis=0)
    if kind == "box":
        return t_in, t_out
    radius, slope = ((1 - o[2]) / 2, -d[2] / 2) if kind == "cone" else (1.0, 0.0)
    a = d[0] * d[0] + d[1] * d[1] - slope * slope
    b = o[0] * d[0] + o[1] * d[1] - radius * slope
    c = o[0] * o[0] + o[1] * o[1] - radius * radius
    root = np.sqrt(b * b - a * c)
    enter, leave = (-b - root) / a, (-b + root) / a
    if kind == "cone":
        # A steep ray (a < 0) crosses the cone and its mirror image above: downward it enters ours, upward it leaves it.
        enter, leave = np.where((a < 0) & (slope < 0), -np.inf, enter), np.where((a < 0) & (slope > 0), np.inf, leave)
    return np.maximum(t_in, enter), np.minimum(t_out, leave)


def _trace(layout: Layout, rays_3SHW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each sample the nearest object's depth (S, H, W), inf for none, and index, int8, -1 for none; and of each
    object how many samples it would fill alone, (K,)."""
    shape = rays_3SHW.shape[1:]
    depth, owner = np.full(shape, np.inf, dtype=np.float32), np.full(shape, -1, dtype=np.int8)
    outlines = np.zeros(len(layout.kinds))
    windows = _windows(layout, _corners(layout), shape[-1])
    for k, (kind, window) in enumerate(zip(layout.kinds, windows, strict=True)):
        o, d = _unit_rays(layout, k, rays_3SHW[:, *window])
        t_in, t_out = _crossing(kind, o, d)
        hit = t_in < t_out
        outlines[k] = np.count_nonzero(hit)
        hit &= t_in < depth[window]
        depth[window][hit], owner[window][hit] = t_in[hit], k
    return depth, owner, outlines


def _unit_rays(layout: Layout, k: int, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Origin and directions, components first, of camera rays in the space where object k is a unit shape."""
    to_unit = layout.to_unit[k]
    origin = (to_unit @ (layout.camera - layout.centres[k])).astype(np.float32)
    return origin.reshape(3, *[1] * (rays.ndim - 1)), _turn(to_unit @ layout.view.T, rays)


def _turn(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """A (3, 3) matrix times vectors (3, ...), float32."""
    return (matrix.astype(np.float32) @ vectors.reshape(3, -1)).reshape(vectors.shape)


def _render(layout: Layout, look: Look, size: int) -> np.ndarray:
    """(size, size, 3) uint8, from 2 x 2 samples a pixel."""
    rays_3SHW = _pixel_rays(size, 2)
    depth, owner, _ = _trace(layout, rays_3SHW)
    directions = _turn(layout.view.T, rays_3SHW)
    ground_depth = np.float32(-layout.camera[2]) / np.minimum(directions[2], np.float32(-1e-4))
    np.minimum(depth, ground_depth, out=depth)
    lit, contact = _shadows(layout, look, rays_3SHW, depth, owner)
    colour = _shade_ground(layout, look, directions, depth, lit, contact)
    shown = np.flatnonzero(owner >= 0)
    shown = shown[np.argsort(owner.ravel()[shown], kind="stable")]
    owner_M, depth_M, lit_M = (array.ravel()[shown] for array in (owner, depth, lit))
    rays_3M, lights_3M = rays_3SHW.reshape(3, -1)[:, shown], look.lights[:, shown // (size * size)]
    colour.reshape(3, -1)[:, shown] = _shade_objects(layout, look, owner_M, rays_3M, depth_M, lit_M, lights_3M)
    pixels = np.sqrt(np.clip(colour.mean(axis=1), 0, 1)) * 255 + 0.5
    return np.ascontiguousarray(pixels.astype(np.uint8).transpose(1, 2, 0))


def _shadows(
    layout: Layout, look: Look, rays_3SHW: np.ndarray, depth: np.ndarray, owner: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample: 1 where nothing stands before the sun, else 0; and how open the sky is, less close to objects."""
    lit, contact = np.ones_like(depth), np.ones_like(depth)
    around = _corners(layout, reach=1.6)
    fallen = [around - light * (around[:, :, 2:] / light[2]) for light in look.lights.T]
    windows = _windows(layout, np.concatenate([around, *fallen], axis=1), depth.shape[-1])
    for k, (kind, window) in enumerate(zip(layout.kinds, windows, strict=True)):
        o, d = _unit_rays(layout, k, rays_3SHW[:, *window])
        points = o + d * depth[window]
        sun = _turn(layout.to_unit[k], look.lights)
        t_in, t_out = _crossing(kind, points, sun[:, :, None, None])
        hit = (t_in < t_out) & (t_out > 0) & (owner[window] != k)
        lit[window][hit] = 0
        near = np.clip((1.6 - np.sqrt(np.maximum((points * points).sum(axis=0) - 1, 0))) / 1.2, 0, 1)
        contact[window] *= 1 - 0.55 * near * near
    return lit, contact


def _shade_ground(
    layout: Layout, look: Look, directions: np.ndarray, depth: np.ndarray, lit: np.ndarray, contact: np.ndarray
) -> np.ndarray:
    """(3, S, H, W) colours of the textured ground and the sky; depth is that of the nearest surface."""
    x, y = (np.float32(layout.camera[axis]) + depth * directions[axis] for axis in (0, 1))
    blend = 0.5 + (_texture(look, x, y) - 0.5) * np.exp(-0.03 * depth)  # far away it is finer than a pixel
    sun = look.sun * look.lights[2].mean()
    ambient = 0.25 * look.zenith + 0.08
    high = np.clip(directions[2] * 3, 0, 1)
    haze = np.where(directions[2] < -1e-4, np.exp(-look.fog * depth), 0)
    colour = np.empty_like(directions)
    for c in range(3):
        albedo = look.ground[0, c] + blend * (look.ground[1, c] - look.ground[0, c])
        ground = albedo * (0.8 * sun[c] * lit + ambient[c] * contact)
        sky = look.horizon[c] + high * (look.zenith[c] - look.horizon[c])
        colour[c] = sky + haze * (ground - sky)
    return colour


def _texture(look: Look, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share, 0 to 1, of the second ground colour at points of the ground."""
    count = {"gradient": 1, "stripes": 1, "checker": 2, "tiles": 2}.get(look.texture, 4)
    waves = [np.sin(kx * x + ky * y + phase) for kx, ky, phase in look.waves[:count]]
    match look.texture:
        case "gradient":
            return 0.5 + 0.5 * waves[0]
        case "stripes":
            return np.clip(0.5 + 4 * waves[0], 0, 1)
        case "checker":
            return np.clip(0.5 + 6 * waves[0] * waves[1], 0, 1)
        case "tiles":
            return np.clip(1.5 - 8 * np.minimum(np.abs(waves[0]), np.abs(waves[1])), 0, 1)
        case "noise":
            return np.clip(0.5 + 0.25 * sum(waves), 0, 1)
    return np.clip(0.5 + 2 * sum(waves), 0, 1)


def _surface(
    layout: Layout, look: Look, owner: np.ndarray, rays_3M: np.ndarray, depth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals (3, M) and albedos (3, M) of samples that show objects, sorted by object."""
    normals_3M, blend = np.empty_like(rays_3M), np.empty_like(depth)
    starts = np.searchsorted(owner, np.arange(len(layout.kinds) + 1))
    for k, kind in enumerate(layout.kinds):
        part = slice(starts[k], starts[k + 1])
        o, d = _unit_rays(layout, k, rays_3M[:, part])
        points = o + d * depth[part]
        normals_3M[:, part] = _turn(layout.to_unit[k].T, _unit_normals(kind, points))
        blend[part] = np.clip(0.5 + 4 * np.sin(look.stripes[k, :3] @ points + look.stripes[k, 3]), 0, 1)
    normals_3M /= np.sqrt((normals_3M * normals_3M).sum(axis=0))
    first_3M, second_3M = look.albedo.transpose(1, 2, 0)[:, :, owner]
    return normals_3M, first_3M + blend * (second_3M - first_3M)


def _shade_objects(
    layout: Layout,
    look: Look,
    owner: np.ndarray,
    rays_3M: np.ndarray,
    depth: np.ndarray,
    lit: np.ndarray,
    lights_3M: np.ndarray,
) -> np.ndarray:
    """(3, M) colours of samples that show objects, sorted by object: diffuse light, highlight, mirrored horizon."""
    normals_3M, albedo_3M = _surface(layout, look, owner, rays_3M, depth)
    directions = _turn(layout.view.T, rays_3M)
    height = np.float32(layout.camera[2]) + directions[2] * depth
    directions /= np.sqrt((directions * directions).sum(axis=0))

    facing = (directions * normals_3M).sum(axis=0)
    mirrored = directions - 2 * facing * normals_3M
    diffuse = np.clip((normals_3M * lights_3M).sum(axis=0), 0, 1) * lit
    highlight = np.clip((mirrored * lights_3M).sum(axis=0), 0, 1) ** look.polish[owner] * lit
    mirror, grazing = look.mirror[owner], np.clip(1 + facing, 0, 1)
    share = np.where(mirror > 0, mirror + (1 - mirror) * 0.6 * grazing * np.square(np.square(grazing)), 0)
    ground = look.ground.mean(axis=0) * (0.5 + 0.5 * look.sun * look.lights[2].mean())
    sky, bounce = (0.3 * look.zenith + 0.12)[:, None], 0.35 * ground[:, None]
    open_sky = 0.5 + 0.5 * normals_3M[2]
    ambient = (bounce + open_sky * (sky - bounce)) * (0.55 + 0.45 * np.clip(height / 0.6, 0, 1))
    below, above = np.clip(1 + 0.7 * mirrored[2], 0, 1), np.clip(mirrored[2], 0, 1)
    sky_3M = look.horizon[:, None] + above * (look.zenith - look.horizon)[:, None]
    surroundings = np.where(mirrored[2] < 0, ground[:, None] * below, sky_3M)
    tint = np.where(mirror > 0.3, albedo_3M, 1)  # metals colour what they mirror
    gloss = np.where(mirror > 0, 0.4 + mirror, 0.04) * highlight
    matte_3M = albedo_3M * (ambient + look.sun[:, None] * diffuse)
    return matte_3M * (1 - share) + tint * (share * surroundings + gloss * look.sun[:, None])


def _unit_normals(kind: str, points: np.ndarray) -> np.ndarray:
    """Outward normals (3, n), of any length, at points on the surface of a unit shape."""
    if kind == "sphere":
        return points
    if kind == "box":
        return np.where(np.abs(points) >= np.abs(points).max(axis=0), np.sign(points), 0)
    x, y, z = points
    rim = 0.25 * (1 - z) if kind == "cone" else np.zeros_like(z)  # half the cone's radius there
    side = np.stack([x, y, rim])
    cap = np.stack([np.zeros_like(z), np.zeros_like(z), np.sign(z)])
    flat = z < -0.9999 if kind == "cone" else np.abs(z) > 0.9999
    return np.where(flat, cap, side)


def prepare_scenes(
    folder: Path, *, num_train: int, num_validation: int, image_size: int, seed: int, workers: int | None = None
) -> Path:
    """Renders scenes into a folder of Parquet files that `datasets.load_dataset` reads; at once if it is there already.

    Columns: image (PNG), count (classes "3" to "10"), distance (6 classes) and nearest_distance (float32, scene units).
    Splits: train, scenes 0 to num_train - 1 of the seed, and validation, from VALIDATION_START on.
    Returns folder/<name with all parameters>. That folder is complete or absent: it is renamed into place, and a second
    process waits for the first. The files do not depend on `workers` (None: one for each core).
    """
    if num_train < 1 or num_validation < 1 or image_size < 8 or seed < 0:
        got = f"{num_train}, {num_validation}, {image_size} and {seed}"
        raise ValueError(f"scenes need num_train >= 1, num_validation >= 1, image_size >= 8 and seed >= 0, got {got}")
    name = f"scenes-v{VERSION}-{image_size}px-{num_train}+{num_validation}-seed{seed}"
    complete, partial = Path(folder) / name, Path(folder) / f".{name}.partial"
    if complete.is_dir():
        return complete
    complete.parent.mkdir(parents=True, exist_ok=True)
    with open(complete.parent / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when its holder dies
        if complete.is_dir():
            return complete
        if partial.exists():  # left by a run that was killed
            shutil.rmtree(partial)
        partial.mkdir()
        splits = {"train": range(num_train), "validation": range(VALIDATION_START, VALIDATION_START + num_validation)}
        with closing(_rendered_rows(list(splits.values()), seed, image_size, workers or os.cpu_count() or 1)) as rows:
            for split, indices in splits.items():
                _write_split(partial, split, rows, len(indices))
        _sync(partial)
        os.rename(partial, complete)
        _sync(complete.parent)
    return complete


def _rendered_rows(splits: list[range], seed: int, size: int, workers: int) -> Generator[Row, None, None]:
    """The rows of all splits in order, rendered by `workers` processes, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    tasks = [
        split[start : start + SCENES_PER_TASK] for split in splits for start in range(0, len(split), SCENES_PER_TASK)
    ]
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as progress:
            bar = progress.add_task("rendering scenes", total=sum(map(len, splits)))
            for rows in executor.map(functools.partial(_render_rows, seed, size), tasks):
                progress.advance(bar, len(rows))
                yield from rows
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends with it: a worker whose parent was killed would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in worker processes only"
    parent.join()
    os._exit(1)


def _render_rows(seed: int, size: int, indices: range) -> list[Row]:
    rows: list[Row] = []
    for index in indices:
        scene, png = render_scene(seed, index, size), io.BytesIO()
        Image.fromarray(scene.image).save(png, format="PNG", compress_level=3)  # 6 takes twice as long for 4% less
        rows.append((png.getvalue(), scene.count, scene.distance))
    return rows


def _write_split(folder: Path, split: str, rows: Iterator[Row], num_rows: int) -> None:
    """Writes the next num_rows rows as folder/<split>-<shard>-of-<shards>.parquet, as HuggingFace names them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    edges = [f"{edge:g}" for edge in DISTANCE_BIN_EDGES]
    distance_names = ["<" + edges[0], *("-".join(pair) for pair in itertools.pairwise(edges)), ">=" + edges[-1]]
    features = {
        "image": {"_type": "Image"},
        "count": {"names": [str(count) for count in COUNTS], "_type": "ClassLabel"},
        "distance": {"names": distance_names, "_type": "ClassLabel"},
        "nearest_distance": {"dtype": "float32", "_type": "Value"},
    }
    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    types = {"image": image_type, "count": pa.int64(), "distance": pa.int64(), "nearest_distance": pa.float32()}
    schema = pa.schema(types, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    shards = -(-num_rows // SCENES_PER_SHARD)
    for shard in range(shards):
        wanted = min(SCENES_PER_SHARD, num_rows - shard * SCENES_PER_SHARD)
        images, counts, distances = zip(*itertools.islice(rows, wanted), strict=True)
        columns = [
            [{"bytes": image, "path": None} for image in images],
            [count - COUNTS.start for count in counts],
            [distance_bin(distance) for distance in distances],
            distances,
        ]
        arrays = [pa.array(column, type=kind) for column, kind in zip(columns, types.values(), strict=True)]
        path = folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
        pq.write_table(pa.table(arrays, schema=schema), path, row_group_size=100, compression="none")
        _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
