import json

from benchmarks.tables import NONE, write


def row(provider, milliseconds, share):
    median = {"median": milliseconds, "low": milliseconds, "high": milliseconds}
    return {"op": "ema", "shape": "vit_huge", "provider": provider, "milliseconds": median, "share_of_copy": share}


def test_the_readme_has_what_was_measured(tmp_path):
    readme, measured = tmp_path / "README.md", tmp_path / "measurements"
    readme.write_text("above\n<!-- kernels -->\nold\n<!-- /kernels -->\nbelow\n")
    write(readme, measured)
    assert readme.read_text() == f"above\n<!-- kernels -->\n{NONE}\n<!-- /kernels -->\nbelow\n"
    (measured / "gpu").mkdir(parents=True)
    rows = [row("ours", 2.5, 0.934), row("definition", 5.0, 0.4), row("timm ModelEmaV3", 4, 0.5), row("other", 9, 0.2)]
    result = {"device": "A GPU", "torch": "2", "triton": "3", "copy_gigabytes_per_second": 2900.4, "rows": rows}
    (measured / "gpu" / "kernels.json").write_text(json.dumps(result))
    for _ in range(2):
        write(readme, measured)
        text = readme.read_text()
        assert "| ema | vit_huge | 2.500 | 93% | 5.000 |  | 4.000 (timm ModelEmaV3) |" in text
        assert "2,900 GB/s" in text and NONE not in text and text.startswith("above\n") and text.endswith("\nbelow\n")
