"""What each pixel of a scene shows, by small steps along its ray: slow, and without the formulas of raycast.py."""

import functools
import math

import numpy as np

from ijepa_scale.data.scenes.layout import scene_layout

SIZE, STEP = 64, 0.02
INSIDE = {
    "sphere": lambda x, y, z: x * x + y * y + z * z <= 1,
    "box": lambda x, y, z: (abs(x) <= 1) & (abs(y) <= 1) & (abs(z) <= 1),
    "cylinder": lambda x, y, z: (x * x + y * y <= 1) & (abs(z) <= 1),
    "cone": lambda x, y, z: (np.hypot(x, y) <= (1 - z) / 2) & (abs(z) <= 1),
}


@functools.cache
def marched(seed: int, index: int) -> np.ndarray:
    """Depth (K, SIZE, SIZE) of each object alone, inf where it is missed, by small steps along each pixel's ray."""
    layout = scene_layout(seed, index)
    depth = np.full((len(layout.kinds), SIZE, SIZE), np.inf)
    edge = math.tan(math.radians(21))
    for row, column in np.ndindex(SIZE, SIZE):
        u, v = ((column + 0.5) / SIZE * 2 - 1) * edge, (1 - (row + 0.5) / SIZE * 2) * edge
        ray = layout.view[0] + u * layout.view[1] + v * layout.view[2]
        closest = (layout.centres - layout.camera) @ ray / (ray @ ray)
        missed_by = np.linalg.norm(layout.camera + closest[:, None] * ray - layout.centres, axis=1)
        for k in np.flatnonzero(missed_by < 1.4):  # no shape reaches as far from its centre
            steps = closest[k] + np.arange(-1.4, 1.4, STEP)
            points = layout.camera + steps[:, None] * ray - layout.centres[k]
            inside = INSIDE[layout.kinds[k]](*np.linalg.solve(layout.axes[k], points.T))
            if inside.any():
                depth[k, row, column] = steps[inside.argmax()]
    return depth


def nearest(depth: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE) index of the object in front, from `marched`; -1 for none."""
    return np.where(np.isfinite(depth).any(axis=0), depth.argmin(axis=0), -1)
