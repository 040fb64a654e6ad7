import torch
import torch.nn.functional as F

from ijepa_kernels.patchify import IMAGENET_MEAN, IMAGENET_STD
from ijepa_scale.models import vit as vit_module
from ijepa_scale.models.vit import PatchEmbed, pixel_columns


def test_patches_of_14_pixels_have_rows_of_a_multiple_of_64_on_a_gpu_in_bf16():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert pixel_columns(14, torch.bfloat16, cuda) == pixel_columns(14, torch.float16, cuda) == 640
    for patch_size in (4, 8, 16):  # 48, 192 and 768 pixels: multiples of 16 bytes as they are
        assert pixel_columns(patch_size, torch.bfloat16, cuda) == 3 * patch_size**2
    assert pixel_columns(14, torch.float32, cuda) == pixel_columns(14, torch.bfloat16, cpu) == 588


def test_a_padded_patch_embedding_and_its_gradients_are_those_of_the_convolution(monkeypatch):
    """Whatever the padding: here on a CPU. Names, shapes and values of the weights are those of public checkpoints."""
    embed = PatchEmbed(14, 24)
    images = torch.randint(256, (2, 3, 28, 42), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert {name: tuple(value.shape) for name, value in embed.named_parameters()} == {
        "proj.weight": (24, 3, 14, 14),
        "proj.bias": (24,),
    }
    embed.double()
    upstream = torch.randn(12, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def outcome():
        out = embed(images, None, torch.float64)
        return out, *torch.autograd.grad(out, list(embed.parameters()), upstream)

    plain = outcome()
    monkeypatch.setattr(vit_module, "pixel_columns", lambda *asked: 640)
    padded = outcome()
    assert padded[1].shape == (24, 3, 14, 14)
    for ours, theirs in zip(padded, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    normalized = (images.double() / 255 - mean) / std
    convolved = F.conv2d(normalized, embed.proj.weight, embed.proj.bias, stride=14).flatten(2).transpose(1, 2)
    torch.testing.assert_close(padded[0], convolved.flatten(0, 1), rtol=1e-12, atol=1e-12)
