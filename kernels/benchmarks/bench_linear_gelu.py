"""The MLP's first product and its GELU in the target's forward, beside the product alone, which is cuBLAS's.

linear_gelu(fused=True) is to be switched on where "ours" takes at most 1.11 times as long as the product alone.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cases import CASES, case_of, num_bytes, tokens
from ijepa_kernels.linear_gelu import linear_gelu, linear_gelu_definition
from ijepa_scale import build

PROVIDERS = {
    "ours": lambda *inputs: linear_gelu(*inputs, fused=True),
    "definition": linear_gelu_definition,
    "compiled": torch.compile(linear_gelu_definition, dynamic=False),
    "the product alone": F.linear,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_all_tokens(case, provider, row):
    case = case_of(*case)
    size = build.vit_size(case.config.model)
    x, weight = tokens(case.images * case.masks.num_patches, size.width), tokens(size.mlp_width, size.width)
    bias = tokens(1, size.mlp_width)[0]
    with torch.no_grad():
        row(
            lambda: PROVIDERS[provider](x, weight, bias),
            op="linear_gelu, all patches",
            shape=case.label,
            provider=provider,
            bytes_moved=num_bytes(x, weight, bias) + len(x) * size.mlp_width * x.element_size(),
        )
