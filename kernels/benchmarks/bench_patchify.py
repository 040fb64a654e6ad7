import pytest
import torch

from benchmarks.cases import CASES, DEVICE, DTYPE, case_of, num_bytes
from ijepa_kernels.patchify import patchify, patchify_definition
from ijepa_scale.models.vit import pixel_columns

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
    columns = pixel_columns(patch_size, DTYPE, images.device)  # as the step has them

    def run():
        return PROVIDERS[provider](images, patch_size, indices_T=indices, dtype=DTYPE, columns=columns)

    out = run()
    moved = num_bytes(out) + len(out) * 3 * patch_size**2  # a byte in for each pixel
    row(run, op=f"patchify, {which}", shape=case.label, provider=provider, bytes_moved=moved)
