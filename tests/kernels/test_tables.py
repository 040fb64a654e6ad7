import json

import pytest

from benchmarks.tables import NO_GPU, NO_STEP, NONE, keep, write


def row(provider, milliseconds, share):
    median = {"median": milliseconds, "low": milliseconds, "high": milliseconds}
    return {"op": "ema", "shape": "vit_huge", "provider": provider, "milliseconds": median, "share_of_copy": share}


def test_a_page_has_what_was_measured(tmp_path):
    page, measured = tmp_path / "page.md", tmp_path / "measurements"
    page.write_text("above\n<!-- kernels -->\nold\n<!-- /kernels -->\nbelow\n")
    write(page, measured)
    assert page.read_text() == f"above\n<!-- kernels -->\n{NONE}\n<!-- /kernels -->\nbelow\n"
    (measured / "gpu").mkdir(parents=True)
    rows = [row("ours", 2.5, 0.934), row("definition", 5.0, 0.4), row("timm ModelEmaV3", 4, 0.5), row("other", 9, 0.2)]
    result = {"device": "A GPU", "torch": "2", "triton": "3", "copy_gigabytes_per_second": 2900.4, "rows": rows}
    (measured / "gpu" / "kernels.json").write_text(json.dumps(result))
    for _ in range(2):
        write(page, measured)
        text = page.read_text()
        assert "| ema | vit_huge | 2.500 | 93% | 5.000 |  | 4.000 (timm ModelEmaV3) |" in text
        assert "2,900 GB/s" in text and NONE not in text and text.startswith("above\n") and text.endswith("\nbelow\n")


def test_measurements_are_kept_whole_or_as_they_were(tmp_path):
    path = tmp_path / "gpu" / "kernels.json"
    for rows in ([], [row("ours", 2.5, 0.934)]):
        keep({"rows": rows}, path)
        assert json.loads(path.read_text()) == {"rows": rows}
    before = path.read_text()
    with pytest.raises(TypeError):
        keep({"rows": [object()]}, path)
    assert path.read_text() == before


def step_row(name, context, gflop, rate, **more):
    spread = {"median": rate / 100, "low": rate / 125, "high": rate / 80}
    row = {"name": name, "context_tokens_per_image": context, "gflop_per_step": gflop, "speedup": spread}
    row |= {"images_per_second": {"median": rate}, "gflop_per_second": {"median": 2 * rate}, "share_of_matmul": 0.5}
    return row | more


def test_a_page_has_the_steps_that_were_timed(tmp_path):
    page, measured = tmp_path / "page.md", tmp_path / "measurements"
    page.write_text("a\n<!-- step -->\nold\n<!-- /step -->\nb\n<!-- kernels -->\n\n<!-- /kernels -->\n")
    write(page, measured)
    assert page.read_text().startswith(f"a\n<!-- step -->\n{NO_STEP}\n<!-- /step -->\nb\n")
    gpu = {"gpu": "A GPU", "torch": "2.11"}
    cpu = {"cpu": "A CPU", "cores": 8, "threads": 4, "torch": "2.15"}
    memory = {"state_bytes": 3 << 30, "step_bytes": 5 << 29}
    for folder, config, machine, precision, batch, more in (
        ("gpu", "vith14", gpu, "bf16", 32, memory | {"mfu": 0.412}),
        ("gpu", "vitb16", gpu, "bf16", 128, memory),
        ("cpu", "tiny", cpu, "fp32", 16, {}),
    ):
        (measured / folder).mkdir(parents=True, exist_ok=True)
        rows = [step_row("dense baseline", 70, 64.0, 100, **more), step_row("ijepa-scale", 110.4, 96e3, 251.26, **more)]
        result = {"config": config, "machine": machine, "precision": precision, "batch": batch, "steps": rows}
        (measured / folder / f"step-{config}.json").write_text(json.dumps(result))
    for _ in range(2):
        write(page, measured)
    text = page.read_text()
    order = [
        "A CPU, 8 cores:",
        "| tiny, 16; fp32, torch 2.15, 4 threads |",
        "A GPU:",
        "| vitb16, 128;",
        "| vith14, 32;",
    ]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order), text
    assert "| vith14, 32; bf16, torch 2.11 | dense baseline | 70 | 2 | 100.0 | 1.00 (0.80-1.25) |" in text
    assert "|  | ijepa-scale | 110 | 3,000 | 251.3 | 2.51 (2.01-3.14) | 0.503 | 50% | 41.2% | 3.0 + 2.5 |" in text
    assert text.count("peak unknown") == 2 and text.count("MFU") == 1, "a CPU has no such columns"
    assert text.endswith("b\n<!-- kernels -->\n" + NONE + "\n<!-- /kernels -->\n")


def alone(rate, milliseconds, expected):
    run = {"machine": {"gpu": "A GPU", "torch": "2.11"}, "model": "vit_huge/14", "batch": 128}
    run |= {"images_per_second": {"median": rate}, "step_seconds": {"median": milliseconds / 1000}}
    run |= {"share_of_sustained": 0.517, "peak_memory_bytes": 47 << 30}
    return run | {"estimate": {"milliseconds": expected} if expected else {"missing": "rates"}}


def test_a_page_has_the_step_alone_and_where_its_time_goes(tmp_path):
    page, folder = tmp_path / "page.md", tmp_path / "measurements" / "gpu"
    page.write_text("<!-- gpu -->\n\n<!-- /gpu -->\n<!-- gpu-categories -->\nold\n<!-- /gpu-categories -->\n")
    folder.mkdir(parents=True)
    write(page, folder.parent)
    assert page.read_text().count(NO_GPU) == 2
    categories = [{"name": "matrix products", "milliseconds": 187.04}, {"name": "copies", "milliseconds": 4.0}]
    achieved = {"matrix products": {"tflop_per_second": 552.4}, "copies": {"gigabytes_per_second": 2810.2}}
    traced = {"machine": {"gpu": "A GPU"}, "categories": [*categories, {"name": "idle", "milliseconds": 2.2}]}
    for name, result in (
        ("device", {"matrix_flop_per_second": 7.004e14, "copy_bytes_per_second": 2.9e12}),
        ("alone", alone(436.7, 293.12, 291.0)),
        ("alone-compiled", {"error": "ended after its 180 s", "output": []}),
        ("trace", traced | {"achieved": achieved}),
        ("trace-compiled", traced | {"categories": categories[:1], "achieved": {}}),
        ("kernels", {"error": "exit code 1"}),
        ("step-vith14", {"error": "exit code 1"}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(result))
    for _ in range(2):
        write(page, folder.parent)
    text = page.read_text()
    assert "A GPU, torch 2.11: 700 TFLOP/s sustained in large matrix products" in text and "2,900 GB/s" in text
    assert "| vit_huge/14, eager | 128 | 437 | 293.1 | 291.0 | 52% | 47.0 |\n<!-- /gpu -->" in text, "the other failed"
    assert "| matrix products | 187.0 | 187.0 | 552 TFLOP/s |  |" in text
    assert "| copies | 4.0 |  | 2,810 GB/s |  |" in text and "| idle | 2.2 |  |  |  |" in text
    (folder / "alone.json").write_text(json.dumps(alone(436.7, 293.12, None) | {"share_of_sustained": None}))
    write(page, folder.parent)
    assert "| vit_huge/14, eager | 128 | 437 | 293.1 |  |  | 47.0 |" in page.read_text()
