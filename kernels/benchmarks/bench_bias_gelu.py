"""The MLP's bias and GELU, of both networks that are trained."""

import pytest
import torch

from benchmarks.bench_norm_residual import NETWORKS
from benchmarks.cases import CASES, case_of, num_bytes, tokens
from ijepa_kernels.bias_gelu import bias_gelu, bias_gelu_definition
from ijepa_scale import build

PROVIDERS = {
    "ours": bias_gelu,
    "definition": bias_gelu_definition,
    "compiled": torch.compile(bias_gelu_definition, dynamic=False),
}


def inputs_of(name, images, network):
    case = case_of(name, images)
    context = network == "context encoder"
    size = build.vit_size(case.config.model) if context else build.predictor_size(case.config)
    packed = case.masks.context if context else case.masks.prediction
    x, bias = tokens(len(packed.indices_T), size.mlp_width), tokens(1, size.mlp_width)[0]
    return x.requires_grad_(), bias.requires_grad_(), f"{case.label}, {network}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward(case, network, provider, row):
    x, bias, shape = inputs_of(*case, network)
    run = PROVIDERS[provider]
    row(lambda: run(x, bias), op="bias_gelu", shape=shape, provider=provider, bytes_moved=2 * num_bytes(x))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_backward(case, network, provider, row):
    x, bias, shape = inputs_of(*case, network)
    out = PROVIDERS[provider](x, bias)
    upstream = torch.randn_like(out)
    row(
        lambda: torch.autograd.grad(out, [x, bias], upstream, retain_graph=True),
        op="bias_gelu backward",
        shape=shape,
        provider=provider,
        bytes_moved=3 * num_bytes(x),
    )
