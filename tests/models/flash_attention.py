"""Stands in for the flash-attention packages: what they are called by, in PyTorch, and how it was called."""

import sys
from contextlib import AbstractContextManager
from itertools import pairwise
from types import ModuleType

import torch
from torch.library import Library

# hopper/flash_api.cpp of flash-attention; {} is the default of what may be None, which 2.8 began without.
FA3 = {
    "fwd": "(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new{}, Tensor(v_new!)? v_new{}, Tensor? q_v{}, "
    "Tensor(out!)? out{}, Tensor? cu_seqlens_q{}, Tensor? cu_seqlens_k{}, Tensor? cu_seqlens_k_new{}, "
    "Tensor? seqused_q{}, Tensor? seqused_k{}, int? max_seqlen_q{}, int? max_seqlen_k{}, Tensor? page_table{}, "
    "Tensor? kv_batch_idx{}, Tensor? leftpad_k{}, Tensor? rotary_cos{}, Tensor? rotary_sin{}, "
    "Tensor? seqlens_rotary{}, Tensor? q_descale{}, Tensor? k_descale{}, Tensor? v_descale{}, "
    "float? softmax_scale{}, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "int attention_chunk=0, float softcap=0.0, "
    "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, "
    "int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)",
    "bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq{}, "
    "Tensor(dk!)? dk{}, Tensor(dv!)? dv{}, Tensor? cu_seqlens_q{}, Tensor? cu_seqlens_k{}, Tensor? seqused_q{}, "
    "Tensor? seqused_k{}, int? max_seqlen_q{}, int? max_seqlen_k{}, float? softmax_scale{}, bool is_causal=False, "
    "int window_size_left=-1, int window_size_right=-1, float softcap=0.0, bool deterministic=False, int sm_margin=0"
    ") -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def forward(q, k, v, bounds):
    """One sequence and head at a time: the output (T, H, E) and the log-sum-exp of the scores (H, T)."""
    out, normalizers = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[1], q.shape[0])
    for start, stop in pairwise(bounds.tolist()):
        for h in range(q.shape[1]):
            scores = q[start:stop, h] @ k[start:stop, h].T / q.shape[-1] ** 0.5
            normalizers[h, start:stop] = scores.logsumexp(-1)
            out[start:stop, h] = scores.softmax(-1) @ v[start:stop, h]
    return out, normalizers


def backward(dout, q, k, v, out, normalizers, bounds, dq, dk, dv):
    """From what the forward gave, into dq, dk and dv."""
    scale = q.shape[-1] ** -0.5
    for start, stop in pairwise(bounds.tolist()):
        for h in range(q.shape[1]):
            qs, ks, vs, outs, ds = (part[start:stop, h] for part in (q, k, v, out, dout))
            weights = (qs @ ks.T * scale - normalizers[h, start:stop, None]).exp()
            of_scores = weights * (ds @ vs.T - (ds * outs).sum(-1, keepdim=True)) * scale
            dq[start:stop, h], dk[start:stop, h], dv[start:stop, h] = of_scores @ ks, of_scores.T @ qs, weights.T @ ds


class Packed(torch.autograd.Function):
    """flash-attn 2's, whose backward makes one buffer."""

    @staticmethod
    def forward(ctx, qkv, installed, bounds, longest, deterministic):
        out, normalizers = installed.forward(*qkv.unbind(1), bounds, longest)
        ctx.save_for_backward(qkv, out, normalizers, bounds)
        ctx.installed, ctx.longest, ctx.deterministic = installed, longest, deterministic
        return out

    @staticmethod
    def backward(ctx, dout):
        qkv, out, normalizers, bounds = ctx.saved_tensors
        into = torch.empty_like(qkv)
        tensors = (dout.contiguous(), *qkv.unbind(1), out, normalizers)
        ctx.installed.backward(*tensors, bounds, ctx.longest, *into.unbind(1), ctx.deterministic)
        return into, None, None, None, None


class Installed(AbstractContextManager):
    """While it is entered the packages can be imported. fa3_defaults: whether its operators have them all.

    deterministic: what backwards were asked for. written: where the last put the gradients of q, k and v.
    """

    def __init__(self, monkeypatch, *, fa3_defaults=True):
        self.deterministic, self.written = [], []
        for name, functions in {
            "flash_attn": {"flash_attn_varlen_qkvpacked_func": self.fa2},
            "flash_attn_interface": {},
            "flash_attn.cute": {"flash_attn_varlen_func": self.fa4},
            "flash_attn.cute.interface": {"_flash_attn_bwd": self.fa4_backward},
        }.items():
            module = ModuleType(name)
            module.__path__ = []
            for function, call in functions.items():
                setattr(module, function, call)
            monkeypatch.setitem(sys.modules, name, module)
        self.library = Library("flash_attn_3", "DEF")
        for name, call in {"fwd": self.fa3, "bwd": self.fa3_backward}.items():
            self.library.define(name + FA3[name].replace("{}", "=None" if fa3_defaults else ""))
            self.library.impl(name, call, "CPU")

    def __exit__(self, *error):
        self.library._destroy()

    def forward(self, q, k, v, bounds, longest):
        assert bounds.dtype == torch.int32 and type(longest) is int and longest == bounds.diff().max()
        assert all(part.stride(-1) == 1 and part.data_ptr() % 16 == 0 for part in (q, k, v))
        return forward(q, k, v, bounds)

    def backward(self, dout, q, k, v, out, normalizers, bounds, longest, dq, dk, dv, deterministic):
        assert longest == bounds.diff().max() and all(part.stride(-1) == 1 for part in (dout, q, k, v, out, dq, dk, dv))
        self.deterministic.append(deterministic)
        self.written = [part.data_ptr() for part in (dq, dk, dv)]
        backward(dout, q, k, v, out, normalizers, bounds, dq, dk, dv)

    # flash-attn 2.8.3
    def fa2(
        self, qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert (dropout_p, softmax_scale, causal, window_size, softcap) == (0.0, None, False, (-1, -1), 0.0)
        assert alibi_slopes is None and not return_attn_probs
        return Packed.apply(qkv, self, cu_seqlens, max_seqlen, deterministic)

    def fa3(self, q, k, v, *given):
        *_, cu_seqlens_q, cu_seqlens_k, _, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k = given[:11]
        scale, causal, left, right, chunk, softcap, _, _, splits = given[20:29]
        assert all(value is None for value in (*given[:4], seqused_q, seqused_k, *given[11:20]))
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k and scale == q.shape[-1] ** -0.5
        assert (causal, left, right, chunk, softcap, splits) == (False, -1, -1, 0, 0.0, 1)
        out, normalizers = self.forward(q, k, v, cu_seqlens_q, max_seqlen_q)
        return out, normalizers, q.new_empty(0), q.new_empty(0)

    def fa3_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, softmax_scale, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert seqused_q is seqused_k is None and max_seqlen_q == max_seqlen_k and not is_causal
        assert softmax_scale == q.shape[-1] ** -0.5 and (window_size_left, window_size_right) == (-1, -1)
        tensors = (dout, q, k, v, out, softmax_lse)
        self.backward(*tensors, cu_seqlens_q, max_seqlen_q, dq, dk, dv, deterministic)
        return dq, dk, dv, *(q.new_empty(0) for _ in range(5))

    # flash-attn-4 4.0.0b4 to b36
    def fa4(
        self, *, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
        window_size=(None, None), deterministic=False, return_lse=False,
    ):  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k and softmax_scale is None and not causal
        out, normalizers = self.forward(q, k, v, cu_seqlens_q, max_seqlen_q)
        return out, normalizers if return_lse else None

    def fa4_backward(
        self, q, k, v, out, dout, lse, softmax_scale=None, causal=False, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k and softmax_scale is None and not causal
        self.backward(dout, q, k, v, out, lse, cu_seqlens_q, max_seqlen_q, dq, dk, dv, deterministic)
        return dq, dk, dv
