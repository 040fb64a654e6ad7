"""Nearest neighbours: of patches, and a picture of those of images, a row a query, the nearest images beside it."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ijepa_scale.data.images import ImageSet
from ijepa_scale.data.sources.folders import printable
from ijepa_scale.evals.embed import Embeddings, Query
from ijepa_scale.visualize.curves import save
from ijepa_scale.visualize.features import unit

if TYPE_CHECKING:
    from matplotlib.patches import Rectangle


def nearest_patches(
    queries_QD: np.ndarray, images_Q: np.ndarray, features_BND: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest patches of all images but a query's own: which, (Q, count), and how similar; the nearest first.

    images_Q: the image that each query is of; -1: none of these. Which: image * N + patch. Similar: by the cosine
    between features less their mean over all patches, as images are compared (evals/embed.py).
    """
    mean_D = features_BND.mean(axis=(0, 1))
    cosine_QBN = np.einsum("qd,bnd->qbn", unit(queries_QD - mean_D), unit(features_BND - mean_D), optimize=True)
    known = np.flatnonzero(images_Q >= 0)
    cosine_QBN[known, images_Q[known]] = -np.inf
    cosine_QP = cosine_QBN.reshape(len(queries_QD), -1)
    nearest = np.argsort(-cosine_QP, axis=1, kind="stable")[:, :count]
    return nearest, np.take_along_axis(cosine_QP, nearest, axis=1)


def look_up(
    embeddings: Embeddings,
    images: ImageSet,
    queries: Iterable[Query],
    count: int,
    say: Callable[[str], None] = lambda text: None,
) -> list[tuple[np.ndarray, str, list[tuple[np.ndarray, str]]]]:
    """The nearest images of each query, as draw_neighbours() takes them.

    images: those that the embeddings are of. say: is told their names and similarities.
    """
    shown = []
    for query in queries:
        nearest = embeddings.nearest(query, count)
        say(f"{printable(query.name)}:")
        for row, similarity in nearest:
            say(f"  {similarity:.3f}  {embeddings.table[row]['image']}")
        pictures = [(embeddings.picture(row, images), f"{similarity:.2f}") for row, similarity in nearest]
        shown.append((query.pixels, printable(Path(query.name).name), pictures))
    return shown


def draw_neighbours(path: str | Path, rows: Sequence[tuple[np.ndarray, str, Sequence[tuple[np.ndarray, str]]]]) -> None:
    """Write a PNG. rows: (query image, its name, [(neighbour image, its caption)]); images are (3, H, W) uint8."""
    from matplotlib.figure import Figure

    columns = 1 + max(len(nearest) for _, _, nearest in rows)
    figure = Figure(figsize=(1.3 * columns, 1.5 * len(rows) + 0.3), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (query, name, nearest) in zip(axes, rows, strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, (image, caption) in zip(row, [(query, name), *nearest], strict=False):
            axis.imshow(image.transpose(1, 2, 0), interpolation="nearest")
            short = caption if len(caption) <= 20 else caption[:8] + "..." + caption[-9:]
            axis.set_title(short, fontsize=7, parse_math=False)
        row[0].add_patch(_frame(query))
    save(figure, path)


def _frame(image: np.ndarray) -> "Rectangle":
    from matplotlib.patches import Rectangle

    height, width = image.shape[1:]
    return Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor="#D55E00", linewidth=3, clip_on=False)
