import json

import numpy as np
import pytest

from ijepa_scale.run import numbers
from ijepa_scale.run.history import latest, panels_of, read_history
from tests.run.toy_run import health, step, write_run


def test_a_run_that_went_back_shows_what_it_went_on_with():
    """Slow version: of each step the last record, less those that came before a step was trained anew."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        numbers = np.concatenate([np.arange(a, b) for a, b in np.sort(generator.integers(0, 30, (4, 2)))])
        records = [{"step": int(number), "order": order} for order, number in enumerate(numbers)]
        kept = [one for one in records if all(two["step"] > one["step"] for two in records[one["order"] + 1 :])]
        assert latest(records) == kept


def test_a_run_that_died_in_the_middle_of_a_line_is_read(tmp_path):
    run = write_run(tmp_path / "run", steps=12, finished=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 12, "lo')
    history = read_history(run)
    assert (history.done, history.planned, history.finished, history.skipped) == (12, 20, False, 1)
    assert read_history(write_run(tmp_path / "other")).finished


def test_every_axis_says_what_was_spent_before_a_step(tmp_path):
    run = write_run(tmp_path / "run", steps=0)
    records = [health(7), *(step(number, step_seconds=float(number)) for number in (7, 8, 9)), health(10)]
    records[2]["step_seconds"] = None
    for one in records:
        if one["kind"] == "step" and one["step_seconds"]:
            one["images_per_second"] = 16 / one["step_seconds"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    history = read_history(run)
    assert history.images_a_step == 16
    expected = {"steps": [7, 10], "images": [112, 160], "seconds": [0, 16]}
    for axis, values in expected.items():
        (curve,) = panels_of([history], axis)["Features"][0].curves
        assert list(curve.at) == values
    np.testing.assert_allclose(curve.errors, np.sqrt(25 * 75 / 128))


def test_images_seen_are_of_each_step_s_batch_whatever_was_changed(tmp_path):
    """A run of another's checkpoint at step 200, and a batch of 64 that a resume made 256; against a loop."""
    run = write_run(tmp_path / "run", steps=0)
    batches = dict.fromkeys(range(200, 260), 64) | dict.fromkeys(range(260, 300), 256)
    rows = [step(number, step_seconds=0.5, images_per_second=2.0 * batch) for number, batch in batches.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    history = read_history(run)
    seen = {200: 200 * 64}
    for number, batch in batches.items():
        seen[number + 1] = seen[number] + batch
    assert history.images_seen == seen[300] == 200 * 64 + 60 * 64 + 40 * 256
    at = np.array([200, 230, 260, 261, 299, 300])
    assert history.spent("images", at).tolist() == [seen[number] for number in at.tolist()]
    assert history.begun == 200 and history.spent("seconds", at)[-1] == 50.0
    assert numbers.row(history)[2] == "50.0 s of the last 100 steps" and numbers.row(history)[1] == f"{seen[300]:,}"
    assert numbers.flops(history).endswith("of the model of the last 100 steps")


def test_curves_are_of_the_runs_that_have_them(tmp_path):
    plain, parts = write_run(tmp_path / "plain"), write_run(tmp_path / "parts")
    lines = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: one[key] for key in one if key[:5] != "loss_"} for one in lines if one["kind"] == "step"]
    (plain / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))
    panels = panels_of([read_history(plain), read_history(parts)], "steps")
    runs = {panel.title: [curve.run for curve in panel.curves] for found in panels.values() for panel in found}
    assert runs["loss, may rise: its targets move"] == [0, 1] and runs["loss, variance part"] == [1]
    assert runs["rank of the features (RankMe)"] == [1] and "MFU" not in runs


def test_a_loss_whose_targets_do_not_move_is_not_said_to_rise(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text("objective: {name: mae}\n")
    titles = [panel.title for found in panels_of([read_history(run)], "steps").values() for panel in found]
    assert "loss" in titles and "EMA momentum" not in titles


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metrics.jsonl", None, "has no metrics.jsonl: give the folder of a run"),
        ("metrics.jsonl", "{\n{}\n", "line 1 is not JSON"),
        ("report.json", "[", "report.json is not JSON"),
        ("environment.json", "[]", "environment.json is no JSON object"),
        ("metrics.jsonl", "[]\n", "has a line that is no JSON object"),
        ("config.yaml", "a: [", "config.yaml is not YAML"),
        ("config.yaml", "- a", "holds no config"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    run = write_run(tmp_path / "run")
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_history(run)


def test_a_run_without_a_step_has_no_curve(tmp_path):
    history = read_history(write_run(tmp_path / "run", steps=0))
    assert (history.done, history.images_a_step, history.finished) == (0, 0, False) and panels_of(
        [history], "images"
    ) == {}
