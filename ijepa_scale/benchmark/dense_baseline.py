"""I-JEPA with dense batches, written as the released code is described to work: what the benchmark compares with.

Every patch is embedded and the context gathered afterwards; the context is repeated for each target block; attention
materialises its weights; the target is normalised whole, then gathered; the EMA is a loop over parameters. Parameters
are named as in ijepa_scale/models, whose state dict loads here.
B images, N patches, K tokens kept of each image, M target blocks, D width, P the predictor's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DenseMasks:
    """context_BK, targets_BMK: int64 patch indices; all images keep as many patches."""

    context_BK: torch.Tensor
    targets_BMK: torch.Tensor

    @classmethod
    def of(cls, masks) -> "DenseMasks":
        """From ijepa_scale's packed Masks, whose contexts must be of one length."""
        images = masks.context.cu_seqlens.shape[0] - 1
        if masks.context.num_tokens != images * masks.context.max_seqlen:
            raise ValueError("the dense baseline needs contexts of one length: mask.context=batch_min")
        context = masks.context.indices_T.long() % masks.num_patches
        targets = masks.target_blocks.indices_T.long() % masks.num_patches
        return cls(context.view(images, -1), targets.view(images, -1, masks.target_blocks.max_seqlen))

    def to(self, device: torch.device) -> "DenseMasks":
        return DenseMasks(self.context_BK.to(device), self.targets_BMK.to(device))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BKD: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x_BKD.shape
        qkv = self.qkv(x_BKD).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x_BKD: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x_BKD)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, x_BKD: torch.Tensor) -> torch.Tensor:
        x_BKD = x_BKD + self.attn(self.norm1(x_BKD))
        return x_BKD + self.mlp(self.norm2(x_BKD))


def gather_patches(x_BND: torch.Tensor, indices_BK: torch.Tensor) -> torch.Tensor:
    return torch.gather(x_BND, 1, indices_BK[:, :, None].expand(-1, -1, x_BND.shape[-1]))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.proj(pixels_BCHW).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    pos_embed: torch.Tensor

    def __init__(self, like):
        """like: the ijepa_scale VisionTransformer whose sizes this has."""
        super().__init__()
        size = like.size
        self.patch_embed = PatchEmbed(like.patch_embed.patch_size, size.width)
        self.register_buffer("pos_embed", torch.zeros_like(like.pos_embed))
        self.blocks = nn.ModuleList(Block(size.width, size.heads, size.mlp_width) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)

    def forward(self, pixels_BCHW: torch.Tensor, context_BK: torch.Tensor | None = None) -> torch.Tensor:
        x = self.patch_embed(pixels_BCHW) + self.pos_embed
        if context_BK is not None:
            x = gather_patches(x, context_BK)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class DensePredictor(nn.Module):
    predictor_pos_embed: torch.Tensor

    def __init__(self, like):
        """like: the ijepa_scale Predictor whose sizes this has."""
        super().__init__()
        size = like.size
        self.predictor_embed = nn.Linear(like.predictor_embed.in_features, size.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.register_buffer("predictor_pos_embed", torch.zeros_like(like.predictor_pos_embed))
        self.predictor_blocks = nn.ModuleList(Block(size.width, size.heads, size.mlp_width) for _ in range(size.depth))
        self.predictor_norm = nn.LayerNorm(size.width, eps=1e-6)
        self.predictor_proj = nn.Linear(size.width, like.predictor_proj.out_features)

    def forward(self, context_BKD: torch.Tensor, masks: DenseMasks) -> torch.Tensor:
        """Returns (B * M, K, D), image-major."""
        blocks, seen = masks.targets_BMK.shape[1], masks.context_BK.shape[1]
        positions = self.predictor_pos_embed.expand(len(context_BKD), -1, -1)
        x = self.predictor_embed(context_BKD) + gather_patches(positions, masks.context_BK)
        queries = gather_patches(positions, masks.targets_BMK.flatten(1)) + self.mask_token
        x = torch.cat([x.repeat_interleave(blocks, 0), queries.unflatten(1, (blocks, -1)).flatten(0, 1)], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, seen:])


class DenseJepa(nn.Module):
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, like):
        """like: the ijepa_scale IJepa whose sizes and weights this takes over."""
        super().__init__()
        self.context_encoder = Encoder(like.context_encoder)
        self.predictor = DensePredictor(like.predictor)
        self.target_encoder = Encoder(like.target_encoder).requires_grad_(False)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.load_state_dict(like.state_dict())

    def forward(self, images_BCHW: torch.Tensor, masks: DenseMasks) -> torch.Tensor:
        """images_BCHW: (B, 3, H, W) uint8. Returns the scalar smooth-L1 loss."""
        pixels = (images_BCHW.float() / 255 - self.mean) / self.std
        with torch.no_grad():
            whole = self.target_encoder(pixels)
            whole = F.layer_norm(whole, whole.shape[-1:])
            target = gather_patches(whole, masks.targets_BMK.flatten(1))
        pred = self.predictor(self.context_encoder(pixels, masks.context_BK), masks)
        return F.smooth_l1_loss(pred, target.view_as(pred))

    def pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Parameters and those that are their EMA."""
        yield from zip(self.context_encoder.parameters(), self.target_encoder.parameters(), strict=True)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        for source, target in self.pairs():
            target.data.mul_(momentum).add_((1.0 - momentum) * source.detach().data)
