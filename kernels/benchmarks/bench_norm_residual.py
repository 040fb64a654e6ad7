"""A LayerNorm of the residual stream and the sum that a product goes onto, of both networks that are trained."""

import pytest
import torch

from benchmarks.cases import CASES, DTYPE, case_of, num_bytes, tokens
from ijepa_kernels.norm_residual import norm_residual, norm_residual_definition
from ijepa_scale import build

PROVIDERS = {
    "ours": norm_residual,
    "definition": norm_residual_definition,
    "compiled": torch.compile(norm_residual_definition, dynamic=False),
}
NETWORKS = ["context encoder", "predictor"]


def inputs_of(name, images, network):
    case = case_of(name, images)
    packed = case.masks.context if network == "context encoder" else case.masks.prediction
    width = case.width if network == "context encoder" else build.predictor_size(case.config).width
    vectors = [torch.randn(width, device=tokens(1, 1).device, dtype=DTYPE).requires_grad_() for _ in range(3)]
    return tokens(len(packed.indices_T), width).requires_grad_(), vectors, f"{case.label}, {network}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward(case, network, provider, row):
    x, vectors, shape = inputs_of(*case, network)
    run = PROVIDERS[provider]
    op = "norm_residual"
    row(lambda: run(x, *vectors, 1e-6), op=op, shape=shape, provider=provider, bytes_moved=3 * num_bytes(x))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_backward(case, network, provider, row):
    x, vectors, shape = inputs_of(*case, network)
    outputs = PROVIDERS[provider](x, *vectors, 1e-6)
    upstream = [torch.randn_like(out) for out in outputs]
    row(
        lambda: torch.autograd.grad(outputs, [x, *vectors], upstream, retain_graph=True),
        op="norm_residual backward",
        shape=shape,
        provider=provider,
        bytes_moved=4 * num_bytes(x),
    )
