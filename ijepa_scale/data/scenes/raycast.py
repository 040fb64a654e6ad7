"""Ray casting in NumPy: from what stands where, under which light, to pixels.

In this order: what is drawn; rays, and what they hit; the picture; its shadows and colours.
Letters: K objects, S samples in a pixel, H and W pixels, M samples that show an object.
A change of any pixel here wants a new `layout.VERSION`.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

HALF_VIEW = math.tan(math.radians(21))  # fixed: with a free zoom the image would not tell the distance
UNIT_CORNERS = np.indices((2, 2, 2)).reshape(3, 8) * 2.0 - 1


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


@functools.lru_cache(maxsize=8)
def pixel_rays(size: int, side: int) -> np.ndarray:
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


def trace(layout: Layout, rays_3SHW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def render(layout: Layout, look: Look, size: int) -> np.ndarray:
    """(size, size, 3) uint8, from 2 x 2 samples a pixel."""
    rays_3SHW = pixel_rays(size, 2)
    depth, owner, _ = trace(layout, rays_3SHW)
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
