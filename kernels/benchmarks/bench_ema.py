"""One flat shard against peers that loop over parameters or launch once for them all."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.cases import CASES, DEVICE, case_of
from ijepa_kernels.ema import ema_update, ema_update_definition
from ijepa_scale import build

MOMENTUM = 0.996
compiled = torch.compile(ema_update_definition, dynamic=False)
MODELS = sorted({name for name, _ in CASES})


class Parameters(nn.Module):
    """The context encoder's parameters, in fp32."""

    def __init__(self, shapes):
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes)


def flat(provider, count):
    ema, source = torch.randn(count, device=DEVICE), torch.randn(count, device=DEVICE)
    target = torch.empty(count, device=DEVICE, dtype=torch.bfloat16)
    average = {"ours": ema_update, "definition": ema_update_definition, "compiled": compiled}[provider]
    return lambda: average(ema, source, MOMENTUM, target)


def listed(provider, shapes):
    """Peers average a model; the bf16 copy that a bf16 run needs comes on top."""
    model = Parameters(shapes)
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in model.parameters()]
    if provider == "torch._foreach_lerp_":
        averages = [p.detach().clone() for p in model.parameters()]
        sources = [p.detach() for p in model.parameters()]

        def update():
            torch._foreach_lerp_(averages, sources, 1 - MOMENTUM)
    elif provider == "torch AveragedModel":
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(MOMENTUM))
        averaged.update_parameters(model)  # the first only copies
        averages = [p.detach() for p in averaged.module.parameters()]

        def update():
            averaged.update_parameters(model)
    else:
        from timm.utils import ModelEmaV3

        shadow = ModelEmaV3(model, decay=MOMENTUM)
        averages = [p.detach() for p in shadow.module.parameters()]

        def update():
            shadow.update(model)

    def run():
        update()
        torch._foreach_copy_(copies, averages)

    return run


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "provider",
    ["ours", "definition", "compiled", "torch._foreach_lerp_", "torch AveragedModel", "timm ModelEmaV3"],
)
def test_all_weights(name, provider, row):
    case = case_of(*next(one for one in CASES if one[0] == name))
    with torch.device("meta"):
        shapes = [p.shape for p in build.build_encoder(case.config).parameters()]
    count = sum(shape.numel() for shape in shapes)
    run = flat(provider, count) if provider in ("ours", "definition", "compiled") else listed(provider, shapes)
    shape = f"{case.config.model.name}, {count / 1e6:,.0f} M"
    row(run, op="ema", shape=shape, provider=provider, bytes_moved=14 * count)
