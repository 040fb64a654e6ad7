import pickle
import re
import sys
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ijepa_scale.models.attention import Sequences, packed_attention, packed_attention_reference
from ijepa_scale.models.attention_backends import BACKENDS, Choice, Choices, choose_attention, dense_by_cudnn, pick
from tests.models.flash_attention import Installed
from tests.models.test_attention import qkv_of, sequences_of

BF16, FP32 = torch.bfloat16, torch.float32
WIDTHS = [24, 32, 64, 80, 88, 104]  # ViT-H's predictor in the paper, two for GPUs; ViT-B and -L, -H, -g, -G
LENGTHS = [5, 1, 9, 2]
CPU = torch.device("cpu")


@pytest.fixture
def installed(monkeypatch):
    with Installed(monkeypatch) as packages:
        yield packages


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
    assert installed.deterministic == [False]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4"])
def test_the_gradients_of_q_k_and_v_are_written_where_qkv_s_gradient_has_them(installed, name):
    qkv = qkv_of(17, 2, 24).requires_grad_()
    out = packed_attention(qkv, with_kernel(sequences_of(LENGTHS), BACKENDS[name].load()))
    (gradient,) = torch.autograd.grad(out.sum(), qkv)  # one number, expanded: a kernel wants rows
    assert gradient.is_contiguous()
    assert installed.written == [part.data_ptr() for part in gradient.unbind(1)]


def test_older_operators_of_flash_attention_3_know_no_defaults(monkeypatch):
    qkv, plain = qkv_of(17, 2, 24).requires_grad_(), sequences_of(LENGTHS)
    expected = packed_attention_reference(qkv, plain)
    with Installed(monkeypatch, fa3_defaults=False):
        out = packed_attention(qkv, with_kernel(plain, BACKENDS["fa3"].load()))
        (gradient,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    (exact,) = torch.autograd.grad(expected, qkv, torch.ones_like(out))
    torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4"])
def test_a_kernel_goes_with_activation_checkpointing_and_without_gradients(installed, name):
    qkv, sequences = qkv_of(17, 2, 24).requires_grad_(), with_kernel(sequences_of(LENGTHS), BACKENDS[name].load())
    out = packed_attention(qkv, sequences)
    again = checkpoint(packed_attention, qkv, sequences, use_reentrant=False)
    assert torch.equal(out, again)
    ours, theirs = (torch.autograd.grad(value, qkv, torch.ones_like(value))[0] for value in (out, again))
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(packed_attention(qkv, sequences), out)


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
    qkv, sequences = qkv_of(17, 2, 24).requires_grad_(), with_kernel(sequences_of(LENGTHS), BACKENDS[name].load())
    packed_attention(qkv, sequences).sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        packed_attention(qkv, sequences).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert installed.deterministic == [False, True]


def test_flash_attention_3_without_its_operators_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    with pytest.raises(ImportError, match="older than flash-attention"):
        BACKENDS["fa3"].load()


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


FORWARD, BACKWARD = "aten::_flash_attention_forward", "aten::_flash_attention_backward"


def packed_on(device, attend):
    """Packed tokens of more than 128 in a sequence, on a device that computes nothing: cuDNN would take them."""
    qkv = torch.empty(700, 3, 2, 24, dtype=BF16, device=device, requires_grad=True)
    return qkv, Sequences(torch.empty(5, dtype=torch.int32, device=device), 256, 700, attend)


def attention_calls(calls):
    return [(name, values) for name, values in calls.seen if "atten" in name or "attn" in name or "cudnn" in name]


def test_torch_varlen_is_the_flash_operators_and_no_other():
    """By what the dispatcher is given: a custom operation, whose own choice would not be seen, has another name."""
    qkv, sequences = packed_on("meta", BACKENDS["torch_varlen"].load())
    with Calls() as calls:
        out = packed_attention(qkv, sequences)
        (gradient,) = torch.autograd.grad(out, qkv, torch.empty_like(out))
    assert (out.shape, out.dtype, gradient.shape) == ((700, 2, 24), BF16, qkv.shape)
    (forward, asked), (backward, of_gradient) = attention_calls(calls)
    assert (forward, backward) == (FORWARD, BACKWARD)
    for values in (asked, of_gradient):
        assert values["query"].shape == (700, 2, 24) and values["cum_seq_q"] is values["cum_seq_k"]
        assert values["max_q"] == values["max_k"] == 256 and values["dropout_p"] == 0 and not values["is_causal"]
        assert values["scale"] is values["window_size_left"] is values["window_size_right"] is None


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_torch_varlen_is_flash_on_cuda_where_cudnn_could_be_taken(monkeypatch, capability):
    """PyTorch's own rule for varlen_attn() reads the capability and cuDNN's version; the engine needs a device."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92600)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with FakeTensorMode(), Calls() as calls:
        qkv, sequences = packed_on("cuda", BACKENDS["torch_varlen"].load())
        out = packed_attention(qkv, sequences)
    assert out.is_cuda and out.grad_fn.name() == "FlashAttentionBackward0"
    assert [name for name, _ in attention_calls(calls)] == [FORWARD]


def test_a_kernel_can_be_pickled(installed):
    qkv, sequences = qkv_of(17, 2, 24), sequences_of(LENGTHS)
    attend = BACKENDS["fa3"].load()
    assert torch.equal(pickle.loads(pickle.dumps(attend))(qkv, sequences), attend(qkv, sequences))
    pickle.dumps(BACKENDS["torch_varlen"].load())


def test_cudnn_for_whole_images_is_asked_for_alone():
    """It is not taken on a CPU, and nothing else takes its place."""
    qkv, sequences = qkv_of(16, 2, 24), sequences_of([8, 8])
    with pytest.raises(RuntimeError, match=r"No (viable|available) (backend|kernel)"):
        dense_by_cudnn(qkv, sequences)
    torch.testing.assert_close(packed_attention(qkv, sequences), packed_attention_reference(qkv, sequences))


@pytest.mark.parametrize(
    "major, dtype, there, expected",
    [
        (8, BF16, "fa2 fa3 fa4 torch_varlen", "fa2"),
        (8, BF16, "fa3 fa4 torch_varlen", "torch_varlen"),
        (8, BF16, "", "sdpa"),
        (9, BF16, "fa2 fa3 fa4 torch_varlen triton", "triton"),
        (8, BF16, "torch_varlen triton", "torch_varlen"),
        (9, BF16, "fa2 fa3 fa4 torch_varlen", "fa3"),
        (9, BF16, "fa2 fa4 torch_varlen", "fa2"),
        (9, BF16, "fa4 torch_varlen", "torch_varlen"),
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
        return packed_attention_reference

    choice = pick("auto", major=major, dtype=dtype, head_width=80, load=load)
    assert choice.name == expected and choice.attend is (None if expected == "sdpa" else packed_attention_reference)
    skipped = re.findall(r"(\w+) cannot be imported \(No module named '\w+'\); to install it", choice.why)
    assert not set(skipped) & set(there.split())
    assert choice.why and (
        expected != "sdpa" or major in (8, 9, 10, 12) or "needs" in choice.why or "7.x" in choice.why
    )
    for name in BACKENDS:  # what is asked for is taken, or refused
        if name in there.split() and major == 9 and dtype != FP32:
            assert pick(name, major=major, dtype=dtype, head_width=80, load=load).name == name


def test_auto_takes_triton_for_heads_without_spills_alone():
    def took(width, wanted="auto"):
        return pick(wanted, major=9, dtype=BF16, head_width=width, load=lambda name: packed_attention_reference)

    assert took(128).name == took(136, "triton").name == "triton"
    assert took(136).name == "fa3" and "triton is slow in heads wider than 128" in took(136).why


def test_heads_that_no_kernel_takes_are_left_to_the_definition():
    choice = pick("auto", major=9, dtype=BF16, head_width=20, load=lambda name: packed_attention_reference)
    assert choice.name == "sdpa" and "fa3 takes heads whose width is a multiple of 8 up to 256, not 20" in choice.why


@pytest.mark.parametrize(
    "name, facts, message",
    [
        (
            "fa2",
            {},
            r"^model.attention=fa2 cannot be imported \(.*flash_attn.*\).*pip install flash-attn .*or set it to auto",
        ),
        ("fa3", {}, r"^model.attention=fa3 cannot be imported .*build the folder hopper of github.com/Dao-AILab"),
        ("fa4", {}, r"^model.attention=fa4 cannot be imported .*pip install --pre flash-attn-4"),
        ("fa3", {"major": 8}, r"fa3 trains on compute capability 9.x, this device has 8.x"),
        ("fa3", {"major": 10}, r"fa3 trains on compute capability 9.x, this device has 10.x"),
        ("fa4", {"major": 8}, r"fa4 trains on compute capability 9.x or newer, this device has 8.x"),
        ("torch_varlen", {"major": 7}, r"trains on compute capability 8.x or newer, this device has 7.x"),
        ("fa2", {"dtype": FP32}, r"fa2 takes bf16 and fp16, not float32 \(engine.precision\)"),
        ("fa2", {"major": None}, r"fa2 needs a CUDA device"),
        ("torch_varlen", {"head_width": 20}, r"takes heads whose width is a multiple of 8 up to 256, not 20; or set"),
        (
            "fa2",
            {"head_width": 264, "key": "predictor.attention"},
            "^predictor.attention=fa2 .* 264; or set it to auto$",
        ),
    ],
)
def test_what_is_asked_for_and_cannot_be_had(monkeypatch, name, facts, message):
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ValueError, match=message) as caught:
        options = {"major": 9, "dtype": BF16, "head_width": 80, **facts}
        pick(name, load=lambda key: BACKENDS[key].load(), **options)
    assert "\n" not in str(caught.value)


def test_a_cpu_has_the_definition():
    assert choose_attention("auto", device=CPU, dtype=BF16, head_width=64).attend is None
    assert choose_attention("sdpa", device=CPU, dtype=FP32, head_width=5).name == "sdpa"
    with pytest.raises(ValueError, match=r"^model.attention=torch_varlen needs a CUDA device"):
        choose_attention("torch_varlen", device=CPU, dtype=BF16, head_width=64)


def test_what_each_network_attends_with_is_said_once_where_it_is_the_same():
    fa3, sdpa = Choice("fa3", packed_attention_reference, "auto"), Choice("sdpa", None, "auto")
    same, other = Choices({"encoder": fa3, "predictor": fa3}), Choices({"encoder": fa3, "predictor": sdpa})
    assert (same.name, same.why) == ("fa3", "auto")
    assert (other.name, other.why) == ("encoder: fa3, predictor: sdpa", "auto")
    assert other.attend == {"encoder": packed_attention_reference, "predictor": None}


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
        return choose_attention(name, device=torch.device(device), dtype=BF16, head_width=width).attend
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


def kernels_of(call):
    """The names of the CUDA kernels that it launches, in lower case; it has run before."""
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        call()
        torch.cuda.synchronize()
    return [event.name.lower() for event in traced.events()]


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("width", [80, 24])
def test_the_device_runs_what_was_asked_for_and_no_cudnn(name, width):
    plain = sequences_of([256, 1, 190, 77])
    sequences = Sequences(plain.cu_seqlens.cuda(), 256, 524, gpu_kernel(name, width))
    qkv = qkv_of(524, 16, width, dtype=BF16).cuda().requires_grad_()
    names = kernels_of(lambda: packed_attention(qkv, sequences).sum().backward())
    own = "_short_attention" if name == "triton" else "flash"
    assert sum(own in each for each in names) >= 2 and not [each for each in names if "cudnn" in each], names


@pytest.mark.gpu
def test_cudnn_attends_over_whole_images_where_it_is_asked_for():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("no CUDA device of compute capability 8.0 or newer")
    plain = sequences_of([256] * 4)
    sequences, qkv = Sequences(plain.cu_seqlens.cuda(), 256, 1024), qkv_of(1024, 16, 80, dtype=BF16).cuda()
    with torch.no_grad():
        names = kernels_of(lambda: dense_by_cudnn(qkv, sequences))
        torch.testing.assert_close(
            dense_by_cudnn(qkv, sequences), packed_attention(qkv, sequences), rtol=1e-2, atol=1e-2
        )
    assert any("cudnn" in name for name in names), names
