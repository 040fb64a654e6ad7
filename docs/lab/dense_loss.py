"""The recipes of docs/lab/learning.py and what they minimize, dense and padded.

Networks, initial weights and masks are the project's. B images a step, M blocks, N patches, L padded context tokens, K
padded target patches, D width.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.multiblock import MultiBlock, block_sizes, place_blocks
from ijepa_scale.models.blocks import NORM_EPS, ViTSize
from ijepa_scale.objectives.ijepa import IJepaObjective
from ijepa_scale.objectives.masks import BlockMasks

FORBIDDEN = -1e9  # added to the logits of padding
KNOTS = (0.2, 3.0, 10)  # where Epps and Pulley's statistic compares characteristic functions: from, to, how many


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run. The defaults are small_images.yaml's networks and masks, with Muon."""

    name: str = ""
    images: int = 128_000
    batch: int = 64
    mask_sets: int = 1  # masks of each image; the target encoder sees it once
    seed: int = 0
    image_size: int = 64
    patch: int = 8
    width: int = 192
    depth: int = 6
    predictor_width: int = 96
    predictor_depth: int = 3
    target_scale: tuple[float, float] = (0.15, 0.2)
    context_scale: tuple[float, float] = (0.85, 1.0)
    target_blocks: int = 4
    min_keep: int = 4
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    variance: float = 0.003
    covariance: float = 0.0006
    sigreg: float = 0.0  # of context tokens less their means at each patch (LeJEPA, arXiv:2511.08544)
    context_loss: float = 0.0  # weight of the loss on context tokens (V-JEPA 2.1, arXiv:2603.14482), ramped
    stochastic_positions: float = 0.0  # noise of the target's positions (StoP, arXiv:2308.00566)
    target_norm: str = "layer"  # layer | none | batch | tanh
    dyn_tanh: float = 0.0  # alpha of DynTanh in place of the encoders' last LayerNorm (arXiv:2508.02829)
    target_layers: tuple[int, ...] = ()
    loss: str = "smooth_l1"  # smooth_l1 | l1 | l2
    lr: float = 1e-3
    muon_lr: float = 2.5e-3  # of the blocks' matrices; 0: AdamW's, of all
    start_lr: float = 1e-4
    final_lr: float = 1e-6
    warmup: float = 0.125  # of all steps
    weight_decay: tuple[float, float] = (0.04, 0.4)
    ema: tuple[float, float] = (0.98, 1.0)
    cooldown: float = 0.0  # of all steps, the last: the learning rate then falls to 0 in a straight line
    curve: int = 0  # scored after each of so many steps, too

    @property
    def steps(self) -> int:
        return self.images // self.batch


class DynTanh(nn.Module):
    def __init__(self, width: int, alpha: float):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([alpha]))
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


@dataclass(frozen=True)
class DenseMasks:
    """context: (B, L) patches, in_context: (B, L) 1 or 0. targets: (B, M, K) patches, is_target: (K,) 1 or 0."""

    context: torch.Tensor
    in_context: torch.Tensor
    targets: torch.Tensor
    is_target: torch.Tensor

    def take(self, index: torch.Tensor) -> "DenseMasks":
        """One of a pool of masks, by a tensor of one number, which stays on its device."""
        parts = (self.context, self.in_context, self.targets, self.is_target)
        return DenseMasks(*(part.index_select(0, index)[0] for part in parts))

    def to(self, device: torch.device) -> "DenseMasks":
        parts = (self.context, self.in_context, self.targets, self.is_target)
        return DenseMasks(*(part.to(device) for part in parts))


@functools.cache
def draw_masks(spec: MultiBlock, count: int, images: int, seed: int) -> DenseMasks:
    """A pool of masks for `count` steps: each tensor of DenseMasks with one more dimension, first."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    pool = []
    for _ in range(count):
        sizes = block_sizes(spec, rng)
        pool.append([place_blocks(spec, sizes, rng) for _ in range(images)])
    longest = -(-max(len(one.context) for step in pool for one in step) // 8) * 8
    largest = max(one.target_blocks.shape[1] for step in pool for one in step)
    largest += -(longest + largest) % 8  # kernels want rows of logits that begin at multiples of 16 bytes
    masks = DenseMasks(
        torch.zeros(count, images, longest, dtype=torch.long),
        torch.zeros(count, images, longest),
        torch.zeros(count, images, spec.num_target_blocks, largest, dtype=torch.long),
        torch.zeros(count, largest),
    )
    for i, step in enumerate(pool):
        for j, one in enumerate(step):
            kept, size = len(one.context), one.target_blocks.shape[1]
            masks.context[i, j, :kept] = torch.from_numpy(one.context)
            masks.in_context[i, j, :kept] = 1
            masks.targets[i, j, :, :size] = torch.from_numpy(one.target_blocks)
            masks.is_target[i, :size] = 1
    return masks


def block_forward(block: Any, x: torch.Tensor, logits: torch.Tensor | None, first: int = 0) -> torch.Tensor:
    """A block of dense sequences (S, L, D); the rows from `first` on. logits: (S, L), added to those of each key."""
    sequences, length, width = x.shape
    heads = block.attn.heads
    qkv = F.linear(_norm(block.norm1, x), block.attn.qkv.weight, block.attn.qkv.bias)
    q, k, v = qkv.view(sequences, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    q, x = q[:, :, first:], x[:, first:]
    mask = None if logits is None else logits[:, None, None].expand(sequences, 1, length - first, length)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    x = x + block.attn.proj(mixed)
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(_norm(block.norm2, x))))


def _norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, NORM_EPS)


def build(recipe: Recipe) -> tuple[Any, MultiBlock]:
    """I-JEPA's networks with the project's initial weights, and what its masks are drawn by."""
    side = recipe.image_size // recipe.patch
    spec = MultiBlock(
        grid=PatchGrid(side, side),
        num_target_blocks=recipe.target_blocks,
        target_scale=recipe.target_scale,
        context_scale=recipe.context_scale,
        min_keep=recipe.min_keep,
    )
    width, narrow = recipe.width, recipe.predictor_width
    objective = IJepaObjective(
        encoder=ViTSize(width=width, depth=recipe.depth, heads=width // 64, mlp_width=4 * width),
        predictor=ViTSize(width=narrow, depth=recipe.predictor_depth, heads=width // 64, mlp_width=4 * narrow),
        image_size=recipe.image_size,
        patch_size=recipe.patch,
        draw_masks=BlockMasks(spec, "all", recipe.seed),
        seed=recipe.seed,
        target_layers=recipe.target_layers,
    )
    module = objective.build()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(objective.initial_weight(name, parameter.shape))
    if recipe.dyn_tanh:
        for encoder in (module.context_encoder, module.target_encoder):
            encoder.norm = DynTanh(width, recipe.dyn_tanh)
        module.target_encoder.norm.requires_grad_(False)
    return module, spec


class Loss:
    """What is minimized, of normalized images (B, 3, H, W) and their masks."""

    def __init__(self, recipe: Recipe, module: Any, grid: PatchGrid, device: torch.device, generator: torch.Generator):
        self.recipe, self.module, self.num_patches = recipe, module, grid.num_patches
        self.generator = generator
        places = torch.cartesian_prod(torch.arange(grid.rows), torch.arange(grid.columns)).float()
        self.distances = torch.cdist(places, places).to(device)
        self.knots = torch.linspace(*KNOTS, device=device)  # type: ignore[arg-type]

    def __call__(self, images: torch.Tensor, masks: DenseMasks, ramp: torch.Tensor) -> torch.Tensor:
        """ramp: from 0 to 1, of the context's loss."""
        recipe, m = self.recipe, self.module
        with torch.no_grad():
            full = self.targets(images)
        embedded = self.embed(m.context_encoder, images)
        if recipe.mask_sets > 1:
            full, embedded = (x.repeat_interleave(recipe.mask_sets, 0) for x in (full, embedded))
        logits = (masks.in_context - 1) * -FORBIDDEN
        x = _rows(embedded, masks.context)
        for block in m.context_encoder.blocks:
            x = block_forward(block, x, logits)
        context = m.context_encoder.norm(x)
        predicted_context, predicted = self.predict(context, masks, logits)
        target = _rows(full, masks.targets.flatten(1)).view(predicted.shape)
        count = masks.is_target.sum() * masks.targets.shape[0] * masks.targets.shape[1]
        loss = (self.error(predicted, target) * masks.is_target).sum() / count
        if predicted_context is not None:
            of_context = self.context_error(predicted_context, _rows(full, masks.context), masks)
            loss = loss + recipe.context_loss * ramp * of_context
        return loss + self.against_collapse(context, masks)

    def embed(self, encoder: Any, images: torch.Tensor) -> torch.Tensor:
        rows = F.unfold(images, self.recipe.patch, stride=self.recipe.patch).transpose(1, 2)
        weight, bias = encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias
        return F.linear(rows, weight.flatten(1), bias) + encoder.pos_embed[0]

    def targets(self, images: torch.Tensor) -> torch.Tensor:
        """(B, N, F), of each of the target layers, normalized."""
        recipe, encoder = self.recipe, self.module.target_encoder
        x, outputs = self.embed(encoder, images), []
        for number, block in enumerate(encoder.blocks, 1):
            x = block_forward(block, x, None)
            if number in (recipe.target_layers or (recipe.depth,)):
                outputs.append(encoder.norm(x) if number == recipe.depth else x)
        norms = {
            "layer": lambda x: F.layer_norm(x, x.shape[-1:]),
            "batch": lambda x: (x - x.mean((0, 1))) / (x.var((0, 1)) + 1e-4).sqrt(),
            "tanh": torch.tanh,
            "none": lambda x: x,
        }
        return torch.cat([norms[recipe.target_norm](x) for x in outputs], -1)

    def predict(
        self, context: torch.Tensor, masks: DenseMasks, logits: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Predictions at the context, (B, M, L, F), where there is a loss on them, and at the targets, (B, M, K, F)."""
        recipe, p = self.recipe, self.module.predictor
        positions = p.predictor_pos_embed[0]
        images, blocks, most = masks.targets.shape
        length = context.shape[1]
        known = p.predictor_embed(context) + positions[masks.context]
        asked = p.mask_token.view(-1) + positions[masks.targets]
        if recipe.stochastic_positions:
            noise = torch.randn(images, blocks, most, recipe.width, device=context.device, generator=self.generator)
            asked = asked + F.linear(noise * recipe.stochastic_positions, p.predictor_embed.weight)
        x = torch.cat([known[:, None].expand(-1, blocks, -1, -1), asked], 2).flatten(0, 1)
        padding = ((masks.is_target - 1) * -FORBIDDEN).expand(images, blocks, most)
        keys = torch.cat([logits[:, None].expand(-1, blocks, -1), padding], 2).flatten(0, 1)
        first = 0 if recipe.context_loss else length
        for number, block in enumerate(p.predictor_blocks, 1):
            x = block_forward(block, x, keys, first if number == len(p.predictor_blocks) else 0)
        out = p.predictor_proj(p.predictor_norm(x)).unflatten(0, (images, blocks))
        return (out[:, :, :length], out[:, :, length:]) if recipe.context_loss else (None, out)

    def error(self, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        kinds = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss, "l2": F.mse_loss}
        return kinds[self.recipe.loss](predicted, target, reduction="none").mean(-1)

    def context_error(self, predicted: torch.Tensor, target: torch.Tensor, masks: DenseMasks) -> torch.Tensor:
        """Each token over the root of its distance, in patches, to the nearest of the block that is predicted."""
        apart = self.distances[masks.targets].masked_fill(masks.is_target[:, None] == 0, math.inf).amin(2)  # (B, M, N)
        nearest = apart.gather(2, masks.context[:, None].expand(-1, apart.shape[1], -1))
        weights = masks.in_context[:, None] / nearest.clamp(min=1).sqrt()
        error = self.error(predicted, target[:, None].expand_as(predicted))
        return (error * weights).sum() / (masks.in_context.sum() * apart.shape[1])

    def against_collapse(self, context: torch.Tensor, masks: DenseMasks) -> torch.Tensor:
        """The terms of objectives/regularization.py, or LeJEPA's, of the context's tokens less their patches' means."""
        recipe, inside = self.recipe, masks.in_context.flatten()
        tokens = context.flatten(0, 1)
        at_patch = F.one_hot(masks.context.flatten(), self.num_patches) * inside[:, None]
        means = at_patch.T @ tokens.detach() / at_patch.sum(0)[:, None].clamp(min=1)
        centered = (tokens - at_patch @ means) * inside[:, None]
        loss = tokens.new_zeros(())
        if recipe.variance or recipe.covariance:
            matrix = centered.T @ centered / (inside.sum() - 1)
            variances = matrix.diagonal()
            shortfall = F.relu(1 - (variances + 1e-4).sqrt()).mean()
            covariance = (matrix.square().sum() - variances.square().sum()) / len(variances)
            loss = loss + recipe.variance * shortfall + recipe.covariance * covariance
        if recipe.sigreg:
            slices = torch.randn(tokens.shape[1], 128, device=tokens.device, generator=self.generator)
            angles = (centered @ (slices / slices.norm(dim=0)))[..., None] * self.knots
            normal = torch.exp(-self.knots.square() / 2)
            waves = [(wave * inside[:, None, None]).sum(0) / inside.sum() for wave in (angles.cos(), angles.sin())]
            apart = (waves[0] - normal).square() + waves[1].square()
            loss = loss + recipe.sigreg * 100 * (apart * normal).mean()
        return loss


def _rows(x: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """(B, N, D) -> (B, L, D)."""
    return x.gather(1, patches[..., None].expand(-1, -1, x.shape[-1]))
