import json

from ijepa_scale.run.folder import BadImages, RunFolder
from tests.processes import run_ranks


def lock(folder):
    try:
        RunFolder(folder).lock()
        print("got it")
    except ValueError as error:
        print(error)


def test_one_owner_at_a_time(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    assert "pid" in folder.owner() and not folder.gone  # asking does not give it up
    (other,) = run_ranks(lock, 1, tmp_path, tmp_path / "run")
    assert "is in use by" in other.output and "pid" in other.output and other.code == 0
    folder._lock.close()  # as the process's end does
    (other,) = run_ranks(lock, 1, tmp_path, tmp_path / "run")
    assert other.output.strip() == "got it" and other.code == 0


def test_describe_says_what_ran(tmp_path):
    folder = RunFolder(tmp_path)
    folder.describe("seed: 1\n", world_size=2)
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["packages"]["torch"] and environment["packages"]["deepspeed"]
    assert "git_revision" in environment and "command" in environment


def test_a_report_of_steps_that_are_trained_anew_is_set_aside(tmp_path):
    def left(start_step, report='{"step": 300}'):
        for name, text in (("report.json", report), ("scores.png", "png"), ("masks.png", "png")):
            (tmp_path / name).write_text(text)
        RunFolder(tmp_path).set_aside_report(start_step)
        return sorted(path.name for path in tmp_path.iterdir())

    whole = ["masks.png", "report.json", "scores.png"]
    assert left(300) == left(310) == whole
    assert left(100) == left(0) == ["masks.png", "report.json.old"]
    assert (tmp_path / "report.json.old").read_text() == '{"step": 300}'
    (tmp_path / "report.json.old").unlink()
    assert left(300, report="[") == ["masks.png", "report.json.old"]
    RunFolder(tmp_path).set_aside_report(100)  # there is none


def test_evaluations_of_steps_that_are_trained_anew_are_set_aside(tmp_path):
    for name, text in (("early", '{"step": 100}'), ("late", '{"step": 300}'), ("none", "[")):
        (tmp_path / "evaluations" / name).mkdir(parents=True)
        (tmp_path / "evaluations" / name / "results.json").write_text(text)
    RunFolder(tmp_path).set_aside_report(100)
    found = {path.parent.name: path.name for path in tmp_path.glob("evaluations/*/*")}
    assert found == {"early": "results.json", "late": "results.json.old", "none": "results.json"}


def test_bad_images_are_counted_once_and_survive_a_restart():
    bad = BadImages()
    records = bad.add(3, [(7, "g.png", "torn"), (2, "b.png", "empty"), (7, "g.png", "torn")])
    assert [record["index"] for record in records] == [2, 7]
    assert bad.add(4, [(7, "g.png", "torn")]) == []
    again = BadImages([{"kind": "step", "step": 3}, *records])
    assert sorted(again.known) == [(2, "b.png"), (7, "g.png")]
    assert again.add(5, [(2, "b.png", "empty")]) == []
    (record,) = bad.add(6, [(9, "https://me:pass@host/a.png", "torn")])  # a record hides the password
    assert BadImages([record]).add(7, [(9, "https://me:pass@host/a.png", "torn")]) == []
    assert again.known[7, "g.png"] == {"kind": "bad_image", "step": 3, "index": 7, "sample": "g.png", "reason": "torn"}
