import pytest
import torch

from ijepa_scale.models.attention import Sequences, packed_attention
from ijepa_scale.models.attention_backends import BACKENDS
from ijepa_scale.models.attention_self_test import self_test
from tests.models.test_attention_backends import BF16, CPU, WIDTHS, gpu_kernel, with_kernel


def fused(qkv, sequences):
    """A right kernel in bf16: PyTorch's own of the CPU."""
    return packed_attention(qkv, with_kernel(sequences, None))


def gradients_changed(change):
    """A kernel whose values are right; change(gradient (T, 3, H, E), sequences) is its gradient."""

    def attend(qkv, sequences):
        out = fused(qkv, sequences)

        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, qkv, out):
                return out.clone()

            @staticmethod
            def backward(ctx, upstream):
                (gradient,) = torch.autograd.grad(out, qkv, upstream)
                return change(gradient.clone(), sequences), None

        return Wrong.apply(qkv, out.detach())

    return attend


def spilled(gradient, sequences):
    """As FlashAttention-4 at head widths that are no multiple of 32: a row past a sequence's end is written."""
    gradient[sequences.cu_seqlens[1], 1] += 0.5
    return gradient


def scaled(part, factor):
    def change(gradient, sequences):
        gradient[:, part] *= factor
        return gradient

    return change


def nan_of_padding(gradient, sequences):
    gradient[sequences.cu_seqlens[-2] :] = float("nan")
    return gradient


def leaking(qkv, sequences):
    """The first sequence's end is seen by the second."""
    bounds = sequences.cu_seqlens.clone()
    bounds[1] -= 1
    return fused(qkv, Sequences(bounds, sequences.max_seqlen + 1, sequences.num_tokens))


def unscaled(qkv, sequences):
    """Scores divided by the root of the padded width, 96 for 80."""
    return fused(torch.cat([qkv[:, :1] * (80 / 96) ** 0.5, qkv[:, 1:]], 1), sequences)


def short(qkv, sequences):
    """The last key of the longest is not seen: an off-by-one at a tile's end."""
    q, k, v = qkv.unbind(1)
    keep = torch.ones(sequences.num_tokens, dtype=torch.bool)
    keep[sequences.cu_seqlens[1] - 1] = False
    return fused(torch.stack([q, torch.where(keep[:, None, None], k, torch.zeros_like(k)), v], 1), sequences)


def nan_output(qkv, sequences):
    out = fused(qkv, sequences)
    return torch.where(torch.arange(len(out))[:, None, None] == len(out) - 1, float("nan"), out)


def forward_only(qkv, sequences):
    return fused(qkv.detach(), sequences)


def crashing(qkv, sequences):
    raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")


def try_out(attend, head_shapes=((2, 80),), longest=196, dtype=BF16):
    self_test("fa4", attend, head_shapes, longest=longest, device=CPU, dtype=dtype)


@pytest.mark.parametrize("longest", [1, 16, 196, 256])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_right_kernel_passes(longest, dtype):
    try_out(fused, [(2, width) for width in WIDTHS], longest, dtype)


@pytest.mark.parametrize(
    "attend, message",
    [
        (unscaled, "wrong output in a sequence of 196 tokens"),
        (leaking, "wrong output in a sequence of"),
        (short, "wrong output in a sequence of 196 tokens"),
        (nan_output, "wrong output in a sequence of 40 tokens: off by nan"),
        (gradients_changed(scaled(0, 1.05)), "wrong gradient of q in a sequence of"),
        (gradients_changed(scaled(1, 0.95)), "wrong gradient of k in a sequence of"),
        (gradients_changed(scaled(2, 0.95)), "wrong gradient of v in a sequence of"),
        (gradients_changed(spilled), "wrong gradient of k in a sequence of 1 tokens"),
        (gradients_changed(nan_of_padding), "wrong gradient of q in a sequence of 40 tokens: off by nan"),
        (forward_only, r"failed its test \(.*does not require grad"),
        (crashing, r"failed its test \(CUDA error: no kernel image is available for execution on the device\)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_kernel_is_refused(attend, message):
    with pytest.raises(ValueError, match=f"^model.attention=fa4 on cpu at head width 80 .*{message}") as caught:
        try_out(attend)
    assert str(caught.value).endswith("; use model.attention=torch_varlen or sdpa") and "\n" not in str(caught.value)


def test_the_key_that_chose_a_wrong_kernel_is_named():
    options = {"longest": 16, "device": CPU, "dtype": BF16, "key": "predictor.attention"}
    with pytest.raises(
        ValueError, match=r"^predictor.attention=fa3 on cpu .*; use predictor.attention=torch_varlen or"
    ):
        self_test("fa3", unscaled, [(2, 80)], **options)


def test_a_kernel_that_is_wrong_at_one_head_width_is_refused():
    wrong = gradients_changed(scaled(2, 0.9))

    def attend(qkv, sequences):
        return (wrong if qkv.shape[-1] == 104 else fused)(qkv, sequences)

    try_out(attend, [(2, 64), (3, 24)])
    with pytest.raises(ValueError, match="at head width 104 gives a wrong gradient of v"):
        try_out(attend, [(2, 64), (2, 104)])


@pytest.mark.gpu
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("longest", [196, 784])
def test_each_kernel_is_right(name, width, longest):
    attend = gpu_kernel(name, width)
    self_test(name, attend, [(16, width)], longest=longest, device=torch.device("cuda"), dtype=BF16)
