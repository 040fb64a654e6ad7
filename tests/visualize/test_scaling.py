"""The picture of a scaling: that it holds what it is given, whatever its length."""

from PIL import Image

from ijepa_scale.visualize.scaling import Scaling, draw_scaling


def test_curves_of_several_lengths_make_a_picture(tmp_path):
    path = tmp_path / "below" / "scaling.png"
    long = Scaling(name="weak", gpus=[8, 64, 4096], images_per_second=[1e3, 7e3, 3e5], efficiencies=[100, 88, 60])
    short = Scaling(name="strong", gpus=[8], images_per_second=[1e3], efficiencies=[100])
    draw_scaling(path, "a recipe", [short, long])
    with Image.open(path) as picture:
        assert picture.size == (1080, 432)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    draw_scaling(path, "a recipe", [short])
    with Image.open(path) as picture:
        fewer = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert len(colours) > len(fewer) > 10
