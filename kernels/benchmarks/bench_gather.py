import pytest
import torch

from benchmarks.cases import CASES, case_of, num_bytes, tokens
from ijepa_kernels.gather import gather_rows, gather_rows_definition

compiled = torch.compile(gather_rows_definition, dynamic=False)


def torch_gather(rows, indices):
    return rows.gather(0, indices[:, None].expand(-1, rows.shape[1]))


PROVIDERS = {
    "ours": gather_rows,
    "definition (index_select)": gather_rows_definition,
    "compiled": compiled,
    "torch.gather": torch_gather,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_target_rows(case, provider, row):
    """The target encoder's rows that some target block holds."""
    case = case_of(*case)
    rows, indices = tokens(case.images * case.masks.num_patches, case.width), case.masks.target_patches_U
    moved = 2 * num_bytes(rows[: len(indices)]) + num_bytes(indices)
    run = PROVIDERS[provider]
    with torch.no_grad():
        row(lambda: run(rows, indices), op="gather", shape=case.label, provider=provider, bytes_moved=moved)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_backward(case, provider, row):
    case = case_of(*case)
    rows, indices = tokens(case.images * case.masks.num_patches, case.width), case.masks.target_patches_U
    out = PROVIDERS[provider](rows.requires_grad_(), indices)
    upstream = torch.randn_like(out)
    row(
        lambda: torch.autograd.grad(out, rows, upstream, retain_graph=True),
        op="gather backward, unique rows",  # as in docs/measurements
        shape=case.label,
        provider=provider,
        bytes_moved=num_bytes(upstream, rows, indices),
    )
