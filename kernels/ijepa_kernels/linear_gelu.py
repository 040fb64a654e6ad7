"""GELU of a linear layer in the matrix product's epilogue, without a gradient. T tokens, D width, K the MLP's width."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ijepa_kernels.dispatch import blocks, check_tokens, jit, launch, tl, triton, use_kernels

# One program holds BLOCK_T x BLOCK_K sums in the registers of eight warps, and three stages of both inputs in 144 KiB
# of shared memory, which A100 and H100 both have.
SIZES = {"BLOCK_T": 128, "BLOCK_K": 256, "BLOCK_D": 64, "GROUP": 8}
OPTIONS = {"num_warps": 8, "num_stages": 3}
PROGRAMS = 132  # where there is no device to ask

# --- definition


def linear_gelu_definition(x_TD: torch.Tensor, weight_KD: torch.Tensor, bias_K: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.linear(x_TD, weight_KD, bias_K))


# --- kernel: a program takes tile after tile of the output


@jit
def _gelu(sums, bias_ptr, first, K, COLUMNS: tl.constexpr):
    """Of (rows, COLUMNS) sums and the biases from the first on."""
    columns = first + tl.arange(0, COLUMNS)
    sums += tl.load(bias_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)[None, :]
    return 0.5 * sums * (1.0 + tl.erf(sums * 0.7071067811865476))


@jit
def _linear_gelu_kernel(
    x_ptr,  # (T, D) in
    weight_ptr,  # (K, D) in
    bias_ptr,  # (K,) in
    out_ptr,  # (T, K) out
    T, K, D,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Loads and stores of whole tiles, cut off at the edges: by the hardware that is there for it from H100 on.
    x = tl.make_tensor_descriptor(x_ptr, [T, D], [D, 1], [BLOCK_T, BLOCK_D])
    weight = tl.make_tensor_descriptor(weight_ptr, [K, D], [D, 1], [BLOCK_K, BLOCK_D])
    HALF: tl.constexpr = BLOCK_K // 2
    out = tl.make_tensor_descriptor(out_ptr, [T, K], [K, 1], [BLOCK_T, HALF])
    tiles_t, tiles_k = tl.cdiv(T, BLOCK_T), tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_t * tiles_k, tl.num_programs(0), flatten=True):
        # GROUP rows of tiles column by column: programs that run together share x and weights in the L2 cache.
        group = tile // (GROUP * tiles_k)
        rows = tl.minimum(tiles_t - group * GROUP, GROUP)
        place = tile - group * GROUP * tiles_k
        t = (group * GROUP + place % rows) * BLOCK_T
        k = (place // rows) * BLOCK_K
        sums = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
        for d in range(0, D, BLOCK_D):
            sums = tl.dot(x.load([t, d]), weight.load([k, d]).T, sums)
        # Half of the columns at a time: what GELU needs of registers comes on top of the sums.
        left, right = tl.split(tl.permute(tl.reshape(sums, [BLOCK_T, 2, HALF]), [0, 2, 1]))
        out.store([t, k], _gelu(left, bias_ptr, k, K, HALF).to(out_ptr.dtype.element_ty))
        out.store([t, k + HALF], _gelu(right, bias_ptr, k + HALF, K, HALF).to(out_ptr.dtype.element_ty))


# --- operation


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Where a kernel writes the descriptors of its tiles."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@torch.library.triton_op("ijepa::linear_gelu", mutates_args={})
def _linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    (count, width), mlp_width = x.shape, weight.shape[0]
    out = x.new_empty(count, mlp_width)
    tiles = blocks(count, SIZES["BLOCK_T"]) * blocks(mlp_width, SIZES["BLOCK_K"])
    programs = PROGRAMS
    if x.is_cuda:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
        triton.set_allocator(_scratch)
    grid = (min(tiles, programs),)
    launch(_linear_gelu_kernel, grid, x, weight, bias, out, count, mlp_width, width, **SIZES, **OPTIONS)
    return out


# --- public


def linear_gelu(
    x_TD: torch.Tensor, weight_KD: torch.Tensor, bias_K: torch.Tensor, *, fused: bool = False
) -> torch.Tensor:
    """Exact GELU (arXiv:1606.08415) of x @ weight.T + bias, (T, K).

    x_TD: (T, D), any float dtype; weight_KD: (K, D) and bias_K: (K,) of the same dtype. fused: one kernel on CUDA, for
    bf16 and fp16, D and K multiples of 8, without a gradient. It accumulates in fp32 and rounds once, where the
    definition rounds before GELU as well. Raises ValueError for another type, shape, device, or a gradient.

    fused saves a write and a read of (T, K), 4 bytes a value in bf16 of the 6 that the definition moves there. What it
    pays is the difference between its matrix product and cuBLAS's, and GELU's arithmetic where that hides behind no
    product. So it is off: on an H100 it reaches 77% of cuBLAS (docs/kernels.md).
    """
    if not fused or not use_kernels(x_TD):
        return linear_gelu_definition(x_TD, weight_KD, bias_K)
    check_tokens(x_TD=x_TD, weight_KD=weight_KD)
    if bias_K.shape != weight_KD.shape[:1]:
        raise ValueError(f"bias_K must be ({weight_KD.shape[0]},), got {tuple(bias_K.shape)}")
    types = {tensor.dtype for tensor in (x_TD, weight_KD, bias_K)}
    if len(types) > 1 or not types <= {torch.bfloat16, torch.float16}:
        raise ValueError(f"fused=True takes x, weight and bias in bfloat16 or all in float16, got {types}")
    if x_TD.shape[1] % 8 or weight_KD.shape[0] % 8:
        raise ValueError(f"fused=True takes widths that are multiples of 8, got {tuple(weight_KD.shape)}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_TD, weight_KD, bias_K)):
        raise ValueError("fused=True has no gradient; call it under torch.no_grad(), or with fused=False")
    return _linear_gelu(x_TD.contiguous(), weight_KD.contiguous(), bias_K.contiguous())
