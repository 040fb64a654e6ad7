import pytest
import torch

from benchmarks.cases import CASES, case_of, num_bytes, tokens
from ijepa_kernels.assemble import assemble, assemble_definition

compiled = torch.compile(assemble_definition, dynamic=False)
PROVIDERS = ("ours", "definition", "compiled")


def case_and_run(case, provider):
    case = case_of(*case)
    masks, width = case.masks, case.config.predictor.width
    context = tokens(masks.context.num_tokens, width).requires_grad_()
    mask_token = tokens(1, width)[0].requires_grad_()
    pos = tokens(masks.num_patches, width, torch.float32)
    source, indices = masks.prediction_source_T, masks.prediction.indices_T

    def run():
        if provider == "ours":
            return assemble(
                context,
                mask_token,
                pos,
                source_R=source,
                indices_R=indices,
                copies_TM=masks.prediction_copies_TM,
                mask_rows_K=masks.target_rows_T,
            )
        return (compiled if provider == "compiled" else assemble_definition)(context, mask_token, pos, source, indices)

    return case, run, context, mask_token, num_bytes(pos, source, indices)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward(case, provider, row):
    case, run, context, _, extra = case_and_run(case, provider)
    moved = num_bytes(context, run()) + extra
    with torch.no_grad():
        row(run, op="assemble", shape=case.label, provider=provider, bytes_moved=moved)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_backward(case, provider, row):
    case, run, context, mask_token, _ = case_and_run(case, provider)
    out = run()
    upstream = torch.randn_like(out)
    row(
        lambda: torch.autograd.grad(out, (context, mask_token), upstream, retain_graph=True),
        op="assemble backward",
        shape=case.label,
        provider=provider,
        bytes_moved=num_bytes(upstream, context, case.masks.prediction_copies_TM, case.masks.target_rows_T),
    )
