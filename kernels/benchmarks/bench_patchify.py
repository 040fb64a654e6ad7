import pytest
import torch

from benchmarks.cases import CASES, DEVICE, DTYPE, case_of, num_bytes
from ijepa_kernels.patchify import patchify, patchify_definition

PROVIDERS = {
    "ours": patchify,
    "definition": patchify_definition,
    "compiled": torch.compile(patchify_definition, dynamic=False),
}


@pytest.mark.parametrize("which", ["all", "context"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_patches(case, which, provider, row):
    case = case_of(*case)
    size, patch_size = case.config.data.image_size, case.config.model.patch_size
    images = torch.randint(256, (case.images, 3, size, size), device=DEVICE).to(torch.uint8)
    indices = case.masks.context.indices_T if which == "context" else None

    def run():
        return PROVIDERS[provider](images, patch_size, indices_T=indices, dtype=DTYPE)

    out = run()
    moved = num_bytes(out) + out.numel()  # a byte in for each number out
    row(run, op=f"patchify, {which}", shape=case.label, provider=provider, bytes_moved=moved)
