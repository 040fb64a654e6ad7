"""Which column of a table, or which file of a tar's sample, holds the images to train on, where several hold images."""

import functools
import re
from collections.abc import Iterable

from ijepa_scale.data.decoding import image_extensions
from ijepa_scale.data.sources.folders import warn_once

_PLAIN = {"image", "img", "photo", "photograph", "picture", "pic", "rgb", "pixel", "value", "path", "file", "filename"}
_PLAIN |= {"name", "url"}
# What is made of a picture, or says something of it: words that begin so.
_SECONDARY = re.compile(
    "mask|seg|depth|annot|label|condition|control|ground|gt$|edges?$|canny|normals?$|pose|sketch|thumb|preview|alpha|matte"
    "|trimap|salien|heatmap|disparity|parsing|semantic|instance|panoptic|lidar"
)


def preferred(names: Iterable[str]) -> str:
    """The name that most likely is of photographs: `image`, `jpg` or the like, else the first that says of no mask."""
    return min(names, key=standing)


@functools.lru_cache(maxsize=1024)  # the same few for every sample of a tar
def standing(name: str) -> tuple[int, int]:
    """The lower, the more likely a column's name, or the ending of a tar's member, is that of the photographs.

    `jpg` comes before `image.png`, that before `left.png`, and that before `seg.png`.
    """
    words = re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower())  # conditioningImage: two words
    if any(_SECONDARY.match(word) for word in words):
        return 2, name.count(".")
    plain = all(word in _PLAIN or word.rstrip("s") in _PLAIN or f".{word}" in image_extensions() for word in words)
    return (0 if words and plain else 1), name.count(".")


def are_masks(folder: str) -> bool:
    """Whether a folder's path says that what lies in it is made of pictures, as SegmentationClass."""
    return any(standing(part)[0] == 2 for part in folder.split("/") if part)


def say_chosen(source: str, names: Iterable[str], chosen: str) -> None:
    """One line for the user, where several names could have been meant."""
    warn_once(
        f"{source} has several columns of images ({', '.join(names)}); reading {chosen!r}; data.column (--column of "
        "other commands) chooses another"
    )
