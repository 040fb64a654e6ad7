"""Two machines that do not run the same: each says what differs; mended, the same command goes on."""

import shutil

import pytest

from tests.end_to_end.runs import checkpoints_of, state_of, steps_of
from tests.nodes import ended, ranks_alone, seeing, two_nodes
from tests.processes import PRETRAIN, ROOT, assert_all, pretrain, run_ranks, undrawn

pytestmark = pytest.mark.slow
SECONDS = 150  # on two cores that do nothing else it takes 15, most of which are imports


def copy_of_package(folder):
    """The checkout with another version of one file; how it is started there."""
    for name in ("ijepa_scale", "kernels", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "ijepa_scale" / "__init__.py").open("a") as file:
        file.write('__version__ = "0.0.9"\n')
    return {"program": folder / "launch" / "pretrain.py", "PYTHONPATH": f"{folder}:{folder / 'kernels'}"}


def other_numpy(folder):
    """How a node is started on which another version of a package is installed, as its metadata says it."""
    metadata = folder / "numpy-1.0.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0.0\n")
    return {"PYTHONPATH": f"{folder}:{ROOT}:{ROOT / 'kernels'}"}


def test_what_differs_is_named_on_both_and_the_same_command_goes_on(small_config, image_folder, tmp_path):
    run_dir, copy, older, images = (tmp_path / name for name in ("run", "copy", "older", "images"))
    words = ["--config", str(small_config), f"data.cache_dir={tmp_path / 'cache'}"]
    begun = (*words, f"run_dir={run_dir}", "optimization.stop_at_step=8")
    assert_all(run_ranks(undrawn, 2, tmp_path / "output", pretrain, *begun))
    assert checkpoints_of(run_dir)[-2:] == [4, 8]
    shutil.copytree(run_dir, copy)
    shutil.copytree(run_dir, older)  # what its own disk had held when it was last used
    shutil.rmtree(older / "checkpoints" / "step-00000008")
    shutil.copytree(image_folder, images)
    next(images.rglob("*.png")).unlink()
    whole = state_of(run_dir, 8)

    with two_nodes() as nodes:

        def run(*more, before=(), program=PRETRAIN, both=(), folder=run_dir, **environment):
            """The run on both nodes, of which the second has other words, another folder, other packages or code."""
            started = []
            for number, file, extra in ((0, PRETRAIN, both), (1, program, more)):
                log = tmp_path / f"node-{number}.txt"
                head = [*(before if number else ()), *ranks_alone(nodes, number, 1)]
                environ = environment if number else {}
                given = (*words, f"run_dir={folder}", *extra)
                started.append((nodes[number].start(log, *head, file, *given, **environ), log))
            return [ended(*one, SECONDS) for one in started]

        one, other = (rf"rank {number} ({node.name}, pid " for number, node in enumerate(nodes))

        def refused(ends, *said):
            assert_all(ends, 2)
            for end in ends:  # on both machines
                print(end.output)
                assert "Traceback" not in end.output and "error" in end.output
                for words in said:
                    assert words in end.output, end.output
            assert state_of(run_dir, 8).keys() == whole.keys() and checkpoints_of(run_dir)[-2:] == [4, 8]

        try:
            refused(run(**copy_of_package(tmp_path / "other")), "not all ranks run the same", other, "sources", one)
            refused(run(**other_numpy(tmp_path / "site")), other, "has numpy=1.0.0, " + one)
            refused(run("optimization.lr=0.002"), other, "has optimization.lr=0.002, " + one, "has 0.001")
            refused(run("optimization.lr=fast"), "optimization.lr")
            refused(run(before=seeing(older, run_dir)), f"run_dir {run_dir} of {other}", one,
                    "newest checkpoint step-00000004 there, step-00000008 here")  # fmt: skip
            refused(run(before=seeing(images, image_folder)), other, one, "63 images there, 64 here")
            resume = ("--resume", copy)
            ends = run(*resume, before=seeing(older, copy), both=resume, folder=tmp_path / "new")
            refused(ends, f"{copy}/checkpoints/step-00000008 of {other}", one, "step none there, 8 here")
            ends = run()
            assert_all(ends)
            assert f"resumed from {run_dir}/checkpoints/step-00000008, step 8" in ends[0].output
            assert [step["step"] for step in steps_of(run_dir)] == list(range(12))
        finally:
            for node in nodes:
                node.kill_all()
