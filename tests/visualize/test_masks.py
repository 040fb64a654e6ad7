import numpy as np
import pytest
from PIL import Image

from ijepa_scale.visualize import masks
from ijepa_scale.visualize.masks import BLOCK_COLOURS, MAX_IMAGES, draw_mask_shares, draw_masks


def flat_images(n, height=32, width=32, colour=(250, 20, 20)):
    return np.broadcast_to(np.array(colour, np.uint8)[:, None, None], (n, 3, height, width)).copy()


def picture(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def share(pixels, colour, tolerance=2):
    return (np.abs(pixels - np.array(colour)).max(axis=-1) <= tolerance).mean()


def rgb(name):
    return [int(name[i : i + 2], 16) for i in (1, 3, 5)]


def test_shares_of_the_picture_are_those_of_the_patches(tmp_path):
    """A flat red image shows in the first panel whole, in the others where it is neither hidden nor tinted."""
    red, path = (250, 20, 20), tmp_path / "new folder" / "masks.png"
    context, block = np.arange(8), np.array([10, 11, 14, 15])
    draw_masks(path, flat_images(1), 4, 4, [context], [[block]])
    one = share(picture(path), red)
    draw_masks(path, flat_images(1), 4, 4, [np.arange(16)], [[]])
    whole = share(picture(path), red) / 4  # all four panels
    assert one / whole == pytest.approx(1 + 8 / 16 + 12 / 16 + 8 / 16, rel=0.06)  # outlines and frames cover a little


def test_all_blocks_have_their_colour_in_the_picture(tmp_path):
    blocks = [np.array([row * 8 + column for row in (i, i + 1) for column in (i, i + 1)]) for i in range(6)]
    draw_masks(tmp_path / "masks.png", flat_images(1, colour=(0, 0, 0)), 8, 8, [np.array([7])], [blocks])
    pixels = picture(tmp_path / "masks.png")
    for colour in BLOCK_COLOURS[:6]:
        assert share(pixels, rgb(colour)) > 1e-3
    assert share(pixels, rgb(BLOCK_COLOURS[6])) == 0.0
    draw_masks(tmp_path / "more.png", flat_images(1), 8, 8, [np.array([7])], [blocks * 2])  # more blocks than colours


def test_patches_are_where_their_index_says(tmp_path):
    """Patch 1 of a grid of 2 rows and 4 columns is in the top row, second from the left, of a wide image."""
    images = flat_images(1, 20, 80, colour=(0, 0, 0))
    images[0, :, :10, 20:40] = np.array([0, 255, 0])[:, None, None]
    assert masks._to_pixels(masks._patch_mask(np.array([1]), (2, 4)), images[0].transpose(1, 2, 0)).nonzero()[0].size
    draw_masks(tmp_path / "seen.png", images, 2, 4, [np.array([1])], [[]])
    draw_masks(tmp_path / "hidden.png", images, 2, 4, [np.array([0, 2, 3, 4, 5, 6, 7])], [[]])
    seen, hidden = (share(picture(tmp_path / name), (0, 255, 0)) for name in ("seen.png", "hidden.png"))
    assert seen == pytest.approx(2 * hidden, rel=0.01)  # seen in all four panels, or in two


def test_ragged_contexts_an_empty_context_and_many_images(tmp_path):
    n = MAX_IMAGES + 3
    context = [np.arange(i) for i in range(n)]
    draw_masks(tmp_path / "many.png", flat_images(n), 4, 4, context, [[np.array([15])]] * n)
    draw_masks(
        tmp_path / "max.png", flat_images(MAX_IMAGES), 4, 4, context[:MAX_IMAGES], [[np.array([15])]] * MAX_IMAGES
    )
    np.testing.assert_array_equal(picture(tmp_path / "many.png"), picture(tmp_path / "max.png"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images_BCHW": flat_images(2).astype(np.float32)}, "must be uint8"),
        ({"images_BCHW": flat_images(2)[:, 0]}, "must be uint8"),
        ({"images_BCHW": flat_images(2)[:0]}, "must be uint8"),
        ({"grid_rows": 5}, "do not divide"),
        ({"context": [np.arange(3)]}, "2 images, 1 contexts"),
    ],
)
def test_bad_input_is_refused(tmp_path, change, message):
    good = {
        "images_BCHW": flat_images(2),
        "grid_rows": 4,
        "grid_columns": 4,
        "context": [np.arange(3)] * 2,
        "target_blocks": [[np.arange(2)]] * 2,
    }
    draw_masks(tmp_path / "good.png", **good)
    with pytest.raises(ValueError, match=message):
        draw_masks(tmp_path / "bad.png", **{**good, **change})


@pytest.mark.parametrize("grid", [(2, 3), (16, 16)])
def test_shares_are_drawn_beside_what_is_expected(tmp_path, grid):
    shares = np.linspace(0, 1, 2 * grid[0] * grid[1]).reshape(2, *grid)
    draw_mask_shares(tmp_path / "new" / "a.png", ("context", "target"), shares, shares)
    draw_mask_shares(tmp_path / "new" / "b.png", ("context", "target"), shares, shares[:, ::-1])
    one, other = picture(tmp_path / "new" / "a.png"), picture(tmp_path / "new" / "b.png")
    assert one.shape[0] > 400 and share(one, rgb("#F7F7F7"), 4) > 0.1 + share(other, rgb("#F7F7F7"), 4)  # no difference
