"""What each kernel needs when it is compiled for a GPU: registers, shared memory, spills, width of loads and stores.

python -m ijepa_kernels.resources prints the table as Markdown; no GPU is needed.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ijepa_kernels import dispatch
from ijepa_kernels.adamw_ema import adamw_ema
from ijepa_kernels.assemble import assemble
from ijepa_kernels.bias_gelu import bias_gelu
from ijepa_kernels.ema import ema_update
from ijepa_kernels.gather import gather_rows
from ijepa_kernels.linear_gelu import linear_gelu
from ijepa_kernels.norm_residual import norm_residual
from ijepa_kernels.patchify import patchify
from ijepa_kernels.short_attention import short_attention
from ijepa_kernels.target_loss import target_loss

CAPABILITIES = (80, 90)
WIDTHS = (16, 37, 384, 768, 1024, 1280, 1408, 1664)
HEAD_WIDTHS = (24, 80, 128)
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}

Launch = tuple[Any, tuple, dict[str, Any]]


@dataclass(frozen=True)
class Resources:
    kernel: str
    variant: str  # what it was specialized to
    dtype: str  # of its first tensor
    width: int  # or patch size, or width of a head
    capability: int
    registers: int  # a thread
    shared_bytes: int  # a block
    spilled_bytes: int  # a thread: local memory and stack
    load_bytes: int  # the widest global load of a thread
    store_bytes: int  # and store


def launches(width: int, dtype: torch.dtype) -> list[Launch]:
    """Every launch, forward and backward, of all operations on rows of a width, as on CUDA."""
    tokens = torch.zeros(4, width, dtype=dtype, requires_grad=True)
    pos, mask_token = torch.zeros(2, width), torch.zeros(width, dtype=dtype, requires_grad=True)
    four = torch.arange(4, dtype=torch.int32)
    with dispatch.recording() as recorded:
        gather_rows(tokens, four).sum().backward()
        copies = torch.arange(16, dtype=torch.int32)  # of four tokens, one for each of four target blocks
        rows = {"source_R": copies, "indices_R": copies, "copies_TM": copies.view(4, 4), "mask_rows_K": four[:0]}
        assemble(tokens, mask_token, pos, **rows).sum().backward()
        target_loss(tokens, tokens, four, "smooth_l1").backward()
        target_loss(tokens, tokens, four, "l2", norm=False).backward()
        target_loss(torch.cat([tokens, tokens], dim=1), [tokens, tokens], four, "l2").backward()
        vector = torch.zeros(width, dtype=dtype)
        torch.cat(norm_residual(tokens, vector, vector, vector, 1e-6)).sum().backward()
        bias_gelu(tokens, vector).sum().backward()
        with torch.no_grad():
            norm_residual(tokens, vector, vector, vector, 1e-6, overwrite=True)
            if dtype.itemsize == 2 and width % 8 == 0:
                linear_gelu(tokens, torch.zeros(4 * width, width, dtype=dtype), vector.repeat(4), fused=True)
        ema = torch.zeros(4, width)
        ema_update(ema, ema, 0.9, ema.to(dtype))
        for grad in dict.fromkeys((torch.float32, dtype)):  # of both types that are sent
            written: dict[str, Any] = {"weight": ema.to(dtype), "ema": ema, "target": ema.to(dtype)}
            rates: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.04, "step": 1}
            adamw_ema(ema, ema.to(grad), ema, ema, **rates, grad_scale=torch.ones(()), **written, momentum=0.9)
    return recorded


def patchify_launches(patch_size: int, dtype: torch.dtype) -> list[Launch]:
    images = torch.zeros(1, 3, 2 * patch_size, 2 * patch_size, dtype=torch.uint8)
    with dispatch.recording() as recorded:
        patchify(images, patch_size, dtype=dtype)
        patchify(images, patch_size, indices_T=torch.arange(2, dtype=torch.int32), dtype=dtype)
        patchify(images, patch_size, dtype=dtype, columns=-(-3 * patch_size**2 // 64) * 64)
    return recorded


def attention_launches(head_width: int, dtype: torch.dtype) -> list[Launch]:
    qkv = torch.zeros(4, 3, 16, head_width, dtype=dtype, requires_grad=True)
    with dispatch.recording() as recorded:
        short_attention(qkv, torch.tensor([0, 4], dtype=torch.int32)).sum().backward()
    return recorded


def compile_ahead(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel for one launch, of tensors that start at multiples of 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments, options = launch
    signature, constants, aligned = {}, {}, {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            aligned[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:  # what a run specializes on
                aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    launch_options = {key: value for key, value in options.items() if key not in kernel.arg_names}
    for name in kernel.arg_names[len(arguments) :]:
        signature[name] = "constexpr"
        constants[(kernel.arg_names.index(name),)] = options[name]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch_options)


def compiled(launch: Launch, width: int, dtype: torch.dtype, capability: int) -> Resources:
    import triton

    kernel, binary = launch[0], compile_ahead(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}

    def widest(instruction: str, tile: str) -> int:
        if f"cp.async.bulk.tensor.2d.{tile}" in binary.asm["ptx"]:  # H100's copies of whole tiles
            return 16
        found = re.findall(rf"{instruction}\.global[.\w:]*?(?:\.v(\d))?\.[bus](\d+)", binary.asm["ptx"])
        return max((int(vector or 1) * int(bits) // 8 for vector, bits in found), default=0)

    return Resources(
        kernel=kernel.__name__.strip("_").removesuffix("_kernel"),
        variant=", ".join(key.lower() for key, value in launch[2].items() if value is True),
        dtype=_TYPES[dtype],
        width=width,
        capability=capability,
        registers=used["REG"],
        shared_bytes=max(used["SHARED"], binary.metadata.shared),
        spilled_bytes=used["LOCAL"] + used["STACK"],
        load_bytes=widest("ld", "shared"),
        store_bytes=widest("st", "global"),
    )


def table(widths: Iterable[int], dtypes: Iterable[torch.dtype]) -> Iterator[Resources]:
    for dtype in dtypes:
        for width, recorded in (
            *((width, launches(width, dtype)) for width in widths),
            *((patch_size, patchify_launches(patch_size, dtype)) for patch_size in (14, 16)),
            *((width, attention_launches(width, dtype)) for width in HEAD_WIDTHS if dtype.itemsize == 2),
        ):
            for capability in CAPABILITIES:
                for launch in recorded:
                    yield compiled(launch, width, dtype, capability)


def main() -> None:
    print("| kernel | variant | type | width | sm | registers | shared, bytes | spilled, bytes | widest load, bytes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in dict.fromkeys(table((384, 1280, 1408, 1664), (torch.bfloat16,))):
        print(
            f"| {row.kernel} | {row.variant} | {row.dtype} | {row.width} | {row.capability} | {row.registers} "
            f"| {row.shared_bytes} | {row.spilled_bytes} | {row.load_bytes} |"
        )


if __name__ == "__main__":
    main()
