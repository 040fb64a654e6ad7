import re
import sys
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_scale.models.attention import Sequences, packed_attention, packed_attention_reference
from ijepa_scale.models.attention_backends import BACKENDS, choose_attention, pick
from tests.models.test_attention import qkv_of, sequences_of

BF16, FP32 = torch.bfloat16, torch.float32
WIDTHS = [24, 32, 64, 80, 88, 104]  # ViT-H's predictor in the paper, two for GPUs; ViT-B and -L, -H, -g, -G
LENGTHS = [5, 1, 9, 2]
CPU = torch.device("cpu")


def attention(q, k, v, bounds):
    """One sequence and head at a time."""
    rows = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        heads = [
            torch.softmax(q[start:stop, h] @ k[start:stop, h].T / q.shape[-1] ** 0.5, -1) @ v[start:stop, h]
            for h in range(q.shape[1])
        ]
        rows.append(torch.stack(heads, 1))
    return torch.cat(rows)


class Installed:
    """Stands in for the flash-attention packages: their signatures, in PyTorch, and how they were called."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name, functions in {
            "flash_attn": {"flash_attn_varlen_qkvpacked_func": self.fa2},
            "flash_attn_interface": {"flash_attn_varlen_func": self.fa3},
            "flash_attn.cute": {"flash_attn_varlen_func": self.fa4},
        }.items():
            module = ModuleType(name)
            module.__path__ = []
            for function, call in functions.items():
                setattr(module, function, call)
            monkeypatch.setitem(sys.modules, name, module)

    def compute(self, q, k, v, bounds, longest, deterministic):
        assert bounds.dtype == torch.int32 and type(longest) is int and longest == bounds.diff().max()
        assert all(part.stride(-1) == 1 and part.data_ptr() % 16 == 0 for part in (q, k, v))
        self.calls.append(deterministic)
        return attention(q, k, v, bounds)

    # flash-attn 2.8.3
    def fa2(
        self, qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert (dropout_p, softmax_scale, causal, window_size, softcap) == (0.0, None, False, (-1, -1), 0.0)
        assert alibi_slopes is None and not return_attn_probs
        return self.compute(*qkv.unbind(1), cu_seqlens, max_seqlen, deterministic)

    # hopper/flash_attn_interface.py at 01afd16
    def fa3(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k and not causal and qv is None
        assert seqused_q is seqused_k is softmax_scale is None and window_size == (-1, -1)
        return self.compute(q, k, v, cu_seqlens_q, max_seqlen_q, deterministic)

    # flash-attn-4 4.0.0b36
    def fa4(
        self, q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k and qv is None and not causal
        assert min_seqlen_k is seqused_q is seqused_k is softmax_scale is None
        out = self.compute(q, k, v, cu_seqlens_q, max_seqlen_q, deterministic)
        return out, torch.zeros(q.shape[1], q.shape[0])


@pytest.fixture
def installed(monkeypatch):
    return Installed(monkeypatch)


def with_kernel(sequences, attend):
    return Sequences(sequences.cu_seqlens, sequences.max_seqlen, sequences.num_tokens, attend)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4"])
def test_value_and_gradient_through_each_package_match_the_definition(installed, name, width):
    plain = sequences_of(LENGTHS)
    upstream = torch.randn(17, 2, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for sequences in (with_kernel(plain, BACKENDS[name].load()), plain):
        qkv = qkv_of(17, 2, width).requires_grad_()
        call = packed_attention if sequences is not plain else packed_attention_reference
        out = call(qkv, sequences)
        results.append((out, *torch.autograd.grad(out, qkv, upstream)))
    assert installed.calls == [False]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4"])
def test_strided_and_unaligned_qkv_reach_a_kernel_aligned(installed, name):
    """Off by one element of a storage, every other row, and heads apart: the fakes check what they are given."""
    whole = qkv_of(2 * 17, 4, 24).flatten()
    plain = sequences_of(LENGTHS)
    shape = (17, 3, 2, 24)
    for qkv in (
        whole[1 : 1 + 17 * 144].view(shape),
        whole.view(34, 3, 4, 24)[::2, :, :2],
        whole.view(34, 3, 4, 24)[:17].transpose(1, 2)[:, :2].transpose(1, 2),
    ):
        out = packed_attention(qkv, with_kernel(plain, BACKENDS[name].load()))
        torch.testing.assert_close(out, packed_attention_reference(qkv, plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4"])
def test_deterministic_where_torch_is(installed, name):
    qkv, sequences = qkv_of(17, 2, 24), with_kernel(sequences_of(LENGTHS), BACKENDS[name].load())
    packed_attention(qkv, sequences)
    torch.use_deterministic_algorithms(True)
    try:
        packed_attention(qkv, sequences)
    finally:
        torch.use_deterministic_algorithms(False)
    assert installed.calls == [False, True]


def test_flash_attention_3_that_knows_no_deterministic_and_returns_a_pair(monkeypatch):
    module = ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = lambda q, k, v, cu_q, cu_k, max_q, max_k: (attention(q, k, v, cu_q), None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    qkv, plain = qkv_of(17, 2, 24), sequences_of(LENGTHS)
    out = packed_attention(qkv, with_kernel(plain, BACKENDS["fa3"].load()))
    torch.testing.assert_close(out, packed_attention_reference(qkv, plain), rtol=1e-12, atol=1e-12)


def test_flash_attention_4_alone_is_no_flash_attention_2(installed, monkeypatch):
    """Its wheel leaves a package flash_attn without an __init__."""
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    BACKENDS["fa4"].load()
    with pytest.raises(ImportError, match="flash_attn_varlen_qkvpacked_func"):
        BACKENDS["fa2"].load()


class Calls(TorchDispatchMode):
    """The operations called, with all their arguments by name."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        values = {argument.name: argument.default_value for argument in func._schema.arguments}
        values |= dict(zip(values, args, strict=False)) | (kwargs or {})
        self.seen.append((func.name(), values))
        return func(*args, **(kwargs or {}))


def call_varlen(attend):
    """Value and gradient on a device that computes nothing; the varlen operations that were called."""
    qkv = torch.empty(17, 3, 2, 24, dtype=BF16, device="meta", requires_grad=True)
    sequences = Sequences(torch.empty(5, dtype=torch.int32, device="meta"), 9, 17, attend)
    with Calls() as calls:
        out = packed_attention(qkv, sequences)
        (gradient,) = torch.autograd.grad(out, qkv, torch.empty_like(out))
    assert (out.shape, out.dtype, gradient.shape) == ((17, 2, 24), BF16, qkv.shape)
    return [(name, values) for name, values in calls.seen if "varlen_attn" in name]


def test_torch_varlen_calls_forward_and_backward():
    (forward, arguments), (backward, _) = call_varlen(BACKENDS["torch_varlen"].load())
    assert (forward, backward) == ("torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward")
    assert arguments["query"].shape == (17, 2, 24) and arguments["cu_seq_q"] is arguments["cu_seq_k"]
    assert arguments["max_q"] == arguments["max_k"] == 9 and not arguments["is_causal"] and arguments["scale"] is None


@pytest.mark.parametrize("off", [False, True])
def test_torch_varlen_is_flash_where_cudnn_could_be_taken(monkeypatch, off):
    from torch.nn.attention import SDPBackend, varlen

    if not hasattr(varlen, "_cudnn_rejection_reasons"):
        pytest.skip("this version of torch knows only flash")
    monkeypatch.setattr(varlen, "_cudnn_rejection_reasons", lambda *args: [])
    before = torch.backends.cuda.cudnn_sdp_enabled()

    def backends_of(attend):
        return {values["backend"] for _, values in call_varlen(attend)}

    def by_default(qkv, sequences):
        return varlen.varlen_attn(*qkv.unbind(1), sequences.cu_seqlens, sequences.cu_seqlens, 9, 9)

    assert backends_of(by_default) == {int(SDPBackend.CUDNN_ATTENTION)}  # else the next line would show nothing
    torch.backends.cuda.enable_cudnn_sdp(not off)  # as a run starts, or not
    try:
        assert backends_of(BACKENDS["torch_varlen"].load()) == {int(SDPBackend.FLASH_ATTENTION)}
        assert torch.backends.cuda.cudnn_sdp_enabled() == (not off)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize(
    "major, dtype, there, expected",
    [
        (8, BF16, "fa2 fa3 fa4 torch_varlen", "fa2"),
        (8, BF16, "fa3 fa4 torch_varlen", "torch_varlen"),
        (8, BF16, "", "sdpa"),
        (9, BF16, "fa2 fa3 fa4 torch_varlen", "fa3"),
        (9, BF16, "fa2 fa4 torch_varlen", "torch_varlen"),
        (9, BF16, "fa2 fa4", "fa2"),
        (9, BF16, "fa4", "sdpa"),
        (9, torch.float16, "torch_varlen", "torch_varlen"),
        (10, BF16, "fa2 fa3 fa4 torch_varlen", "torch_varlen"),
        (12, BF16, "fa2 fa4", "sdpa"),
        (7, BF16, "fa2 fa3 fa4 torch_varlen", "sdpa"),
        (9, FP32, "fa2 fa3 fa4 torch_varlen", "sdpa"),
        (None, BF16, "fa2 fa3 fa4 torch_varlen", "sdpa"),
    ],
)
def test_what_auto_takes(major, dtype, there, expected):
    def load(name):
        if name not in there.split():
            raise ImportError(f"No module named {name!r}")
        return attention

    choice = pick("auto", major=major, dtype=dtype, head_widths=WIDTHS, load=load)
    assert choice.name == expected and choice.attend is (None if expected == "sdpa" else attention)
    skipped = re.findall(r"(\w+) cannot be imported \(No module named '\w+'\); to install it", choice.why)
    assert not set(skipped) & set(there.split())
    assert choice.why and (
        expected != "sdpa" or major in (8, 9, 10, 12) or "needs" in choice.why or "7.x" in choice.why
    )
    for name in BACKENDS:  # what is asked for is taken, or refused
        if name in there.split() and major == 9 and dtype != FP32:
            assert pick(name, major=major, dtype=dtype, head_widths=WIDTHS, load=load).name == name


def test_heads_that_no_kernel_takes_are_left_to_the_definition():
    choice = pick("auto", major=9, dtype=BF16, head_widths=[64, 20], load=lambda name: attention)
    assert choice.name == "sdpa" and "fa3 takes heads whose width is a multiple of 8 up to 256, not 20" in choice.why


@pytest.mark.parametrize(
    "name, facts, message",
    [
        (
            "fa2",
            {},
            r"^model.attention=fa2 cannot be imported \(.*flash_attn.*\).*pip install flash-attn .*or leave it at",
        ),
        ("fa3", {}, r"^model.attention=fa3 cannot be imported .*build the folder hopper of github.com/Dao-AILab"),
        ("fa4", {}, r"^model.attention=fa4 cannot be imported .*pip install --pre flash-attn-4"),
        ("fa3", {"major": 8}, r"fa3 trains on compute capability 9.x, this device has 8.x"),
        ("fa3", {"major": 10}, r"fa3 trains on compute capability 9.x, this device has 10.x"),
        ("fa4", {"major": 8}, r"fa4 trains on compute capability 9.x or newer, this device has 8.x"),
        ("torch_varlen", {"major": 7}, r"trains on compute capability 8.x or newer, this device has 7.x"),
        ("fa2", {"dtype": FP32}, r"fa2 takes bf16 and fp16, not float32 \(engine.precision\)"),
        ("fa2", {"major": None}, r"fa2 needs a CUDA device"),
        ("torch_varlen", {"head_widths": [64, 12, 20]}, r"multiple of 8 up to 256, not 12, 20; or leave it at auto$"),
    ],
)
def test_what_is_asked_for_and_cannot_be_had(monkeypatch, name, facts, message):
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ValueError, match=message) as caught:
        options = {"major": 9, "dtype": BF16, "head_widths": WIDTHS, **facts}
        pick(name, load=lambda key: BACKENDS[key].load(), **options)
    assert "\n" not in str(caught.value)


def test_a_cpu_has_the_definition():
    assert choose_attention("auto", device=CPU, dtype=BF16, head_widths=[64]).attend is None
    assert choose_attention("sdpa", device=CPU, dtype=FP32, head_widths=[5]).name == "sdpa"
    with pytest.raises(ValueError, match=r"^model.attention=torch_varlen needs a CUDA device"):
        choose_attention("torch_varlen", device=CPU, dtype=BF16, head_widths=[64])


@pytest.mark.parametrize("name", ["definition", "fa2", "fa3", "fa4"])
def test_padding_is_a_sequence_of_its_own(installed, name):
    """Whatever lies there, values and gradients of the others are theirs; its own gradient is finite."""
    attend = None if name == "definition" else BACKENDS[name].load()
    qkv = qkv_of(17 + 6, 2, 24)
    plain = sequences_of(LENGTHS)
    alone = qkv[:17].clone().requires_grad_()
    expected = packed_attention_reference(alone, plain)
    padded = qkv.clone()
    padded[17:] = 1e4
    padded.requires_grad_()
    out = packed_attention(padded, with_kernel(sequences_of([*LENGTHS, 6]), attend))
    torch.testing.assert_close(out[:17], expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(17, 2, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(value, leaf, upstream)[0] for value, leaf in ((out[:17], padded), (expected, alone))
    )
    torch.testing.assert_close(ours[:17], theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours[17:], torch.zeros_like(ours[17:]))


def gpu_kernel(name, width, device="cuda"):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    try:
        return choose_attention(name, device=torch.device(device), dtype=BF16, head_widths=[width]).attend
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_each_kernel_repeats_itself_where_torch_is_deterministic(name):
    attend = gpu_kernel(name, 80)
    bounds = sequences_of([256, 1, 190, 77])
    sequences = Sequences(bounds.cu_seqlens.cuda(), 256, 524, attend)
    qkv = qkv_of(524, 16, 80, dtype=BF16).cuda().requires_grad_()
    upstream = torch.randn(524, 16, 80, device="cuda", dtype=BF16)
    torch.use_deterministic_algorithms(True)
    try:
        gradients = [torch.autograd.grad(packed_attention(qkv, sequences), qkv, upstream)[0] for _ in range(20)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_no_kernel_waits_for_the_device(name):
    attend = gpu_kernel(name, 80)
    plain = sequences_of([256, 1, 190, 77])
    sequences = Sequences(plain.cu_seqlens.cuda(), 256, 524, attend)
    qkv = qkv_of(524, 16, 80, dtype=BF16).cuda().requires_grad_()
    out = packed_attention(qkv, sequences)  # what compiles does so here
    out.backward(torch.ones_like(out))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = packed_attention(qkv, sequences)
        out.backward(torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")
