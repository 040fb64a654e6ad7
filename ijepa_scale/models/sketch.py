"""From an encoder's features to pixels.

B images, N patches, D width of the features, P its own, K = 3 * p * p pixels.
"""

import torch
from torch import nn

from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.models.attention import Sequences
from ijepa_scale.models.blocks import NORM_EPS, Block, ViTSize, run_blocks
from ijepa_scale.models.positions import sincos_pos_embed

TIME_SCALE = 1000.0  # of times from 0 to 1, before their sines and cosines, as diffusion models number steps


class SketchDecoder(nn.Module):
    """A ViT over an image's patches, each given as its feature and its place, that puts out their pixels."""

    pos_embed: torch.Tensor

    def __init__(self, size: ViTSize, *, feature_width: int, pixels: int, grid: PatchGrid):
        """feature_width: D. pixels: K."""
        super().__init__()
        self.size = size
        self.embed = nn.Linear(feature_width, size.width)
        self.register_buffer("pos_embed", sincos_pos_embed(size.width, grid))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.proj = nn.Linear(size.width, pixels)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.embed.parameters()).dtype  # not by its name, as in VisionTransformer

    def forward(self, features_BND: torch.Tensor) -> torch.Tensor:
        """features_BND: (B, N, D) -> (B, N, K), normalized pixels, channels first."""
        return self._pixels(self.embed(features_BND.to(self.dtype)))

    def _pixels(self, tokens_BNP: torch.Tensor) -> torch.Tensor:
        tokens_BNP = tokens_BNP + self.pos_embed.to(tokens_BNP.dtype)
        images, patches, _ = tokens_BNP.shape
        starts = torch.arange(images + 1, device=tokens_BNP.device, dtype=torch.int32) * patches
        tokens_TP = run_blocks(self.blocks, tokens_BNP.flatten(0, 1), Sequences(starts, patches, images * patches))
        return self.proj(self.norm(tokens_TP)).view(images, patches, -1)


class SketchFlow(SketchDecoder):
    """The same, given noisy pixels besides, and features of some patches alone: it says what is under the noise.

    It is a flow from noise to images (arXiv:2210.02747) that predicts the image, which a plain ViT on pixels can do
    (arXiv:2511.13720). The time is 0 where all is noise, and 1 at the image.
    """

    def __init__(self, size: ViTSize, *, feature_width: int, pixels: int, grid: PatchGrid):
        super().__init__(size, feature_width=feature_width, pixels=pixels, grid=grid)
        self.unknown = nn.Parameter(torch.zeros(1, 1, size.width))  # in the place of a feature
        self.predicted = nn.Parameter(torch.zeros(1, 1, size.width))  # added to one that is no true one
        self.noisy_embed = nn.Linear(pixels, size.width)
        self.time_fc1 = nn.Linear(size.width, size.width)
        self.time_fc2 = nn.Linear(size.width, size.width)

    def forward(  # type: ignore[override]
        self,
        features_BND: torch.Tensor,
        known_BN: torch.Tensor,
        predicted_B: torch.Tensor,
        noisy_BNK: torch.Tensor,
        time_B: torch.Tensor,
    ) -> torch.Tensor:
        """features_BND: (B, N, D), of which those count where known_BN, (B, N) bool, is true. noisy_BNK: (B, N, K).

        predicted_B: (B,) bool, whether an image's are predictions: a sharp one and a vague one of the same values mean
        different things. time_B: (B,), from 0 to 1. Returns (B, N, K), the pixels expected at time 1.
        """
        dtype = self.dtype
        told_BNP = self.embed(features_BND.to(dtype)) + self.predicted.to(dtype) * predicted_B[:, None, None].to(dtype)
        tokens_BNP = torch.where(known_BN[..., None], told_BNP, self.unknown.to(dtype))
        time_B1P = self.time_fc2(nn.functional.silu(self.time_fc1(self._of_time(time_B).to(dtype))))[:, None]
        return self._pixels(tokens_BNP + self.noisy_embed(noisy_BNK.to(dtype)) + time_B1P)

    def _of_time(self, time_B: torch.Tensor) -> torch.Tensor:
        """Sines and cosines of the time at rising wavelengths, (B, P), as of a position (arXiv:1706.03762, 3.5)."""
        half = self.size.width // 2
        rates = 10000.0 ** (-torch.arange(half, device=time_B.device, dtype=torch.float32) / half)
        angles = TIME_SCALE * time_B.float()[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    @torch.no_grad()
    def sample(
        self,
        features_BND: torch.Tensor,
        known_BN: torch.Tensor,
        predicted_B: torch.Tensor,
        noise_BNK: torch.Tensor,
        *,
        steps: int,
    ) -> torch.Tensor:
        """Pixels that fit the known features, (B, N, K) fp32: noise, moved along the flow in equal steps (Euler's).

        features_BND, known_BN, predicted_B: as of forward(). noise_BNK: standard normal; another gives another image.
        """
        pixels_BNK = noise_BNK.float()
        for step in range(steps):
            time_B = torch.full((len(pixels_BNK),), step / steps, device=pixels_BNK.device)
            expected_BNK = self(features_BND, known_BN, predicted_B, pixels_BNK, time_B).float()
            pixels_BNK = pixels_BNK + (expected_BNK - pixels_BNK) / (steps - step)  # the last ends at the image
        return pixels_BNK
