"""MAE and CAE where the kernels run, in bf16, beside float64 on the CPU."""

import pytest
import torch

from ijepa_scale import build
from ijepa_scale.config import load_config
from tests.objectives.test_flops import images_of
from tests.processes import ROOT


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mae", "cae"])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_in_bf16_loss_and_gradients_are_near_the_exact_ones(name, policy):
    overrides = ["model.depth=2", f"engine.activation_checkpointing={policy}"]
    config = load_config(ROOT / "configs" / f"{name}_small.yaml", overrides)
    images, masks = images_of(config, 8), build.build_objective(config).draw_masks(0, range(8))
    exact, model = build.build_model(config).double(), build.build_model(config).bfloat16().cuda()
    expected, loss = exact(images, masks)["loss"], model(images.cuda(), masks.to("cuda"))["loss"]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-2)
    expected.backward()
    loss.backward()
    ours, theirs = (
        torch.cat([parameter.grad.double().cpu().flatten() for parameter in network.parameters()])
        for network in (model, exact)
    )
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99
