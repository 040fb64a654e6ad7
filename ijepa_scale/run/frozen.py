"""sketch.checkpoint: the frozen networks whose features are drawn, read anew at every start and not saved again."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ijepa_scale.config import PretrainConfig, from_dict
from ijepa_scale.engine.checkpoint import Checkpoint
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.exchange.load import find, load, source_of
from ijepa_scale.exchange.networks import NETWORKS, Loaded
from ijepa_scale.models.vit import VIT_SIZES
from ijepa_scale.objectives.objective import Objective
from ijepa_scale.objectives.sketch import FROZEN
from ijepa_scale.run.init_from import check_fits, differing_sizes

Initial = Callable[[str, torch.Size], torch.Tensor]
OF_SOURCE = ("source", "split", "column", "config", "num_images", "cache_dir", "streaming", "eval_split")


def read_network(config: PretrainConfig, network: str) -> Loaded:
    """A network of sketch.checkpoint, as load() calls it. ValueError where there is none."""
    if not config.sketch.checkpoint:
        raise ValueError(
            "sketch.checkpoint is not set: give a run, a checkpoint, or another file that holds an encoder"
        )
    try:
        return load(config.sketch.checkpoint, network)
    except ValueError as error:
        raise ValueError(f"sketch.checkpoint: {error}") from error


def of_encoder(config: PretrainConfig) -> PretrainConfig:
    """A sketch's config with what its encoder fixes: its sizes and its images', and the block that was predicted.

    Where data.source is not set, the images are those that it was trained on. ValueError as of read_network(),
    and for what is no I-JEPA with its predictor, of which nothing could be drawn in the end.
    """
    loaded = read_network(config, "target")
    encoder: Any = loaded.network
    lacking = [name for name in NETWORKS if name not in find(config.sketch.checkpoint).names]
    learned = (loaded.config or {}).get("objective", {}).get("name", "ijepa")
    if lacking or learned != "ijepa":
        what = f"holds no {' and no '.join(lacking)}" if lacking else f"is of the objective {learned}"
        raise ValueError(
            f"sketch.checkpoint={config.sketch.checkpoint} {what}, and sketches are of what I-JEPA predicts: give a "
            "run of it, or an export in the format safetensors"
        )
    sizes = {key: getattr(encoder.size, key) for key in ("width", "depth", "heads", "mlp_width")}
    name = next((name for name, known in VIT_SIZES.items() if known == encoder.size), config.model.name)
    model = replace(config.model, name=name, patch_size=encoder.patch_embed.patch_size, **sizes)
    data = replace(config.data, image_size=loaded.image_size)
    # The checkpoint itself: a run that is named may train on, and its newest one will be another.
    sketch = replace(config.sketch, checkpoint=source_of(config.sketch.checkpoint, loaded))
    if loaded.config:
        theirs = from_dict(dict(loaded.config))
        model = replace(model, name=theirs.model.name)
        if not data.source:
            data = replace(data, **{key: getattr(theirs.data, key) for key in OF_SOURCE})
        loss = replace(config.loss, target_layers=theirs.loss.target_layers)
        config = replace(config, predictor=replace(theirs.predictor, attention=config.predictor.attention), loss=loss)
    return replace(config, model=model, data=data, sketch=sketch)


def initial_weights(
    config: PretrainConfig, objective: Objective, ranks: Ranks, found: Checkpoint | None
) -> tuple[Initial | None, dict[str, Any]]:
    """Weights by name with those of the frozen networks, and what a checkpoint is to say of it; None without one.

    All ranks call it. Raises ValueError, on all of them, where sketch.checkpoint is not there, does not fit, or is not
    what a run that is resumed was trained on.
    """
    if config.objective.name != "sketch":
        return None, {}
    networks = ranks.together(lambda: _fitting(config, objective))
    loaded = networks["encoder"]
    facts = {"path": source_of(config.sketch.checkpoint, loaded), "network": loaded.name, "sha256": loaded.sha256}
    before = found.manifest.get("frozen", facts) if found else facts
    if before["sha256"] != facts["sha256"]:
        raise ValueError(
            f"sketch.checkpoint={config.sketch.checkpoint} is another encoder than the one that {found and found.path} "
            f"was trained on, {before['path']}: give that one, or choose another run_dir"
        )
    weights = {
        f"{name}.{key}": parameter.detach().float()
        for name, one in networks.items()
        for key, parameter in one.network.named_parameters()
    }

    def initial(name: str, shape: torch.Size) -> torch.Tensor:
        return weights[name] if name in weights else objective.initial_weight(name, shape)

    return initial, {"frozen": facts}


def _fitting(config: PretrainConfig, objective: Objective) -> dict[str, Loaded]:
    """The frozen networks by their names in the module."""
    found, given = {}, f"sketch.checkpoint={config.sketch.checkpoint}"
    with torch.device("meta"):  # for its shapes alone
        module = objective.build()
    for name, network in FROZEN.items():
        if not hasattr(module, name):
            continue
        loaded = read_network(config, network)
        if network == "predictor":
            if differing := differing_sizes(module.get_submodule(name), loaded.network):
                raise ValueError(f"{given} holds another predictor: {differing[0]}; set predictor.* to its sizes")
        else:
            check_fits(config, module.get_submodule(name), loaded, given)
        found[name] = loaded
    return found
