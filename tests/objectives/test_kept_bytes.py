"""What each objective says that its backward keeps, against the tensors that autograd saves."""

import pytest
import torch

from ijepa_scale import build
from ijepa_scale.config import load_config
from ijepa_scale.objectives import data2vec, ijepa
from tests.processes import ROOT

IMAGES = 6
# On a CPU sequences of several lengths are attended apart, and put together once more: here they are of one.
PLAIN = ("mask.context=12", "loss.variance=0", "loss.covariance=0")
CASES = {
    "ijepa": ("tiny", PLAIN, 0),
    "ijepa with terms": ("tiny", PLAIN[:1], 4 * 192**2),  # and a matrix of covariances, however many images
    "ijepa of layers": ("tiny", (*PLAIN, "loss.target_layers=[2,4]"), 0),
    "mae": ("mae_small", (), 0),
    "data2vec": ("data2vec_small", (), 0),
    "cae": ("cae_small", (), 0),
}


class OneGradient(torch.autograd.Function):
    """In the place of the loss against features, whose kernel keeps a gradient as large as the predictions."""

    @staticmethod
    def forward(ctx, pred):
        ctx.save_for_backward(torch.ones_like(pred))
        return pred.float().mean()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad


def bytes_saved(module: torch.nn.Module, images: torch.Tensor, masks: object) -> int:
    """Of each storage once. Parameters, and tables of positions, lie there anyway."""
    own = {one.untyped_storage().data_ptr() for one in (*module.parameters(), *module.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held: no other comes to its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(images, masks)["loss"].sum()
    return sum(storage.nbytes() for at, storage in saved.items() if at not in own)


@pytest.mark.parametrize("policy", ["none", "predictor", "every_2", "full"])
@pytest.mark.parametrize("name", CASES)
def test_kept_bytes_are_what_autograd_saves(name, policy, monkeypatch):
    for module in (ijepa, data2vec):
        monkeypatch.setattr(module, "target_loss", lambda pred, *others, **options: OneGradient.apply(pred))
    file, overrides, once = CASES[name]
    given = [*overrides, "model.depth=4", f"engine.activation_checkpointing={policy}"]
    config = load_config(ROOT / f"configs/{file}.yaml", given)
    objective = build.build_objective(config)
    network, side = objective.build().bfloat16(), config.data.image_size
    masks = objective.draw_masks(0, range(IMAGES))
    saved = bytes_saved(network, torch.randint(256, (IMAGES, 3, side, side)).to(torch.uint8), masks)
    counted = IMAGES * sum(objective.expected([masks]).kept_bytes.values())
    assert counted + once == pytest.approx(saved, rel=0.05)
