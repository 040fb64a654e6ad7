import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ijepa_kernels import assemble, dispatch, gather
from ijepa_kernels.ema import ema_update
from ijepa_kernels.patchify import patchify
from ijepa_kernels.target_loss import target_loss
from ijepa_scale.masking.packing import pack_masks
from tests.kernels.accuracy import INTERPRETED
from tests.objectives.test_ijepa import PATCHES, images_of, random_masks, tiny_model

CASES = """
from ijepa_kernels.dispatch import chosen
from ijepa_kernels.gather import gather_rows
print(chosen(torch.device("cpu")))
try:
    print(gather_rows(torch.ones(4, 2), torch.tensor([0, 3, 4])).shape)
except (ValueError, IndexError) as error:
    print(type(error).__name__, error)
"""

CONTRADICTIONS = """
from ijepa_kernels.assemble import assemble
from ijepa_kernels.gather import gather_rows
rows = dict(
    source_R=torch.tensor([0, 1, -1]),
    indices_R=torch.tensor([0, 1, 2]),
    copies_TM=torch.tensor([[0], [1]]),
    mask_rows_K=torch.tensor([2]),
)
two, one = torch.ones(2, 4), torch.ones(4)
assemble(two, one, two, **rows)
for change in (
    {"copies_TM": torch.tensor([[1], [0]])},
    {"mask_rows_K": torch.tensor([1])},
    {"indices_R": torch.tensor([0, -7, 2])},
    None,
):
    try:
        if change:
            assemble(two, one, two, **{**rows, **change})
        else:
            gather_rows(two, torch.tensor([1, 1]))
    except ValueError as error:
        print(error)
"""

RUNS = {  # code, and variables that it runs under
    "plain": (CASES, {}),
    "off": (CASES, {"IJEPA_KERNELS": "off", "TRITON_INTERPRET": "1"}),
    "interpreted": (CASES, {"TRITON_INTERPRET": "1"}),
    "on": (CASES, {"IJEPA_KERNELS": "on"}),
    "yes": (CASES, {"IJEPA_KERNELS": "yes"}),
    "checked": (CASES, {"IJEPA_KERNELS_CHECK": "1", "TRITON_INTERPRET": "0"}),
    "checked and interpreted": (CASES, {"IJEPA_KERNELS_CHECK": "1", "TRITON_INTERPRET": "1"}),
    "contradictions": (CONTRADICTIONS, {"IJEPA_KERNELS_CHECK": "1"}),
}
# The variables are read where ijepa_kernels and Triton are imported: each runs in a fork that has neither yet.
IN_FORKS = """
import io, json, os, sys, contextlib, torch
import sympy  # the most of what ijepa_kernels has torch import, and no reader of variables
assert "triton" not in sys.modules
for name, (code, variables) in json.loads(sys.argv[1]).items():
    if not os.fork():
        os.environ.update(variables)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            try:
                exec(code, {"torch": torch})
            except BaseException as error:
                print(f"{type(error).__name__}: {error}")
        print(json.dumps([name, said.getvalue().splitlines()]), flush=True)
        os._exit(0)
    os.wait()
"""


def lines_of(*names):
    """What each of these of RUNS prints."""
    if INTERPRETED:
        pytest.skip("asked for outside of the interpreter, for all variables")
    settings = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    command = [sys.executable, "-c", IN_FORKS, json.dumps({name: RUNS[name] for name in names})]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.slow
def test_the_environment_decides():
    lines = lines_of("plain", "off", "interpreted", "on", "yes")
    assert lines["plain"][0] == "PyTorch definitions (tensors are on cpu)"
    assert lines["off"][0] == "PyTorch definitions (IJEPA_KERNELS=off)"
    assert lines["interpreted"][0] == "Triton kernels (TRITON_INTERPRET=1)"
    assert "IJEPA_KERNELS=on in the environment, but a tensor is on cpu" in lines["on"][0]
    assert "IJEPA_KERNELS='yes' in the environment; wants one of auto, on, off" in lines["yes"][0]


def test_indices_are_looked_at_when_asked_for():
    lines = lines_of("checked", "checked and interpreted", "contradictions")
    for name in ("checked", "checked and interpreted"):
        assert lines[name][1] == "ValueError indices_K must lie in 0..3, got 4 at [2]"
    found = lines["contradictions"]
    assert len(found) == 4
    assert found[0] == "copies_TM and mask_rows_K do not agree with source_R at row 0"
    assert "do not agree" in found[1] and "indices_R must lie in 0.." in found[2] and "got -7 at [1]" in found[2]
    assert "indices_K must name each row once" in found[3]


@pytest.mark.skipif(INTERPRETED, reason="all tensors go to the kernels")
def test_on_is_an_error_where_a_definition_would_run(monkeypatch):
    monkeypatch.setattr(dispatch, "_mode", "on")
    images, weights = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(4, dtype=torch.float64)
    for run in (lambda: patchify(images, 4, dtype=torch.float64), lambda: ema_update(weights, weights, 0.5)):
        with pytest.raises(ValueError, match="IJEPA_KERNELS=on in the environment, but a tensor is on cpu"):
            run()
    with FakeTensorMode():
        tokens = torch.empty(4, 2, device="cuda")
    assert dispatch.use_kernels(tokens)
    monkeypatch.setattr(dispatch, "triton", None)
    with pytest.raises(ValueError, match="but there is no Triton; install triton or unset it"):
        dispatch.use_kernels(tokens)


def test_a_training_batch_passes_when_indices_are_looked_at(monkeypatch, device):
    model, images = tiny_model().to(device), images_of(3).to(device)
    masks = pack_masks(*random_masks(0, images=3, blocks=2, block_size=4), PATCHES).to(device)
    for module in (dispatch, assemble, gather):
        monkeypatch.setattr(module, "CHECK", True)
    model(images, masks)["loss"].backward()
    with pytest.raises(ValueError, match="indices_T must lie in"):
        model(images, replace(masks, target_index_T=masks.target_index_T + PATCHES * 3))


@pytest.mark.parametrize("width", [1, 16, 37, 96, 384, 768, 1024, 1280, 1408, 1664, 5120])
def test_tiles_waste_little(width):
    rows, columns = dispatch.tile(width)
    assert columns & (columns - 1) == 0 and 16 <= columns <= 1024 and rows * columns <= 4096
    assert width < 16 or width / (-(-width // columns) * columns) > (0.9 if width % 128 == 0 else 0.57)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no devices")
def test_a_launch_is_guarded_by_the_device_of_its_tensors(monkeypatch):
    """The order of calls alone, on any machine; the test below has the devices."""
    calls = []
    with FakeTensorMode():
        out = torch.empty(4, device="cuda:1")

    @contextmanager
    def device_of(tensor):
        calls.append(tensor.device)
        yield
        calls.append("restored")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)
    dispatch.launch({(1,): lambda *arguments: calls.append("launched")}, (1,), out)
    assert calls == [torch.device("cuda:1"), "launched", "restored"]


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors():
    """Not on the current one."""
    rows, indices = torch.randn(5, 48), torch.tensor([3, 0, 4])
    with torch.cuda.device(0):
        ours = rows.to("cuda:1").requires_grad_()
        loss = target_loss(gather.gather_rows(ours, indices.to("cuda:1")), rows.to("cuda:1"), indices.to("cuda:1"))
        loss.backward()
        average = ema_update(rows.to("cuda:1"), torch.zeros(5, 48, device="cuda:1"), 0.5)
        assert torch.cuda.current_device() == 0
    theirs = rows.clone().requires_grad_()
    expected = target_loss(gather.gather_rows(theirs, indices), rows, indices)
    expected.backward()
    for mine, other in ((loss, expected), (ours.grad, theirs.grad), (average, 0.5 * rows)):
        torch.testing.assert_close(mine.cpu(), other, rtol=1e-5, atol=1e-6)


def test_an_empty_grid_is_not_launched():
    dispatch.launch(None, (0, 4))
    assert not INTERPRETED or dispatch.use_kernels(torch.empty(0))
