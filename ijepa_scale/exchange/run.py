"""Networks of runs of our own."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ijepa_scale import build
from ijepa_scale.config import EngineConfig, PretrainConfig, from_dict
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine.checkpoint import Checkpoint
from ijepa_scale.engine.distributed import alone
from ijepa_scale.exchange.networks import ENCODERS, NETWORKS, Loaded, Networks
from ijepa_scale.objectives.objective import Objective


def find_checkpoint(path: Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint in a folder, or the newest whole one of a run folder; and warnings of those that were skipped.

    Raises ValueError where there is no checkpoint that can be read.
    """
    for folder in (path / "checkpoints", path):
        if checkpoints.candidates(folder):
            found, skipped = checkpoints.newest_good(folder, alone())
            assert found is not None  # newest_good() raises where checkpoints exist and none is whole
            return found, [f"warning: skipped a checkpoint that is not whole: {complaint}" for complaint in skipped]
    if not (path / checkpoints.MANIFEST).is_file():
        raise ValueError(f"{path} is no run: there is no checkpoint in {path / 'checkpoints'}; give a run folder")
    found, complaint = checkpoints.verify(path, alone())
    if found is None:
        raise ValueError(f"{path} cannot be used: {complaint}")
    return found, []


def networks(path: Path) -> Networks:
    """What load() gives of a run or a checkpoint folder. Raises ValueError as find_checkpoint() and read_network()."""
    found, notes = find_checkpoint(path)
    config, objective = _described(found)
    with torch.device("meta"):  # for its names alone
        module = objective.build()
    names = [name for name in NETWORKS if name in {**objective.encoders(module), **objective.trained(module)}]
    if not names:
        raise ValueError(
            f"{found.path} trains no encoder: its objective is {objective.name}; give what it was trained on, "
            f"{config.sketch.checkpoint}"
        )

    def read(name: str) -> Loaded:
        return Loaded(
            network=read_network(found, name)[0],
            name=name,
            image_size=config.data.image_size,
            path=found.path,
            sha256=found.manifest["sha256"],
            step=found.step,
            config=found.manifest["config"],
            notes=tuple(notes),
        )

    return Networks(path=found.path, names=tuple(names), read=read)


def read_network(found: Checkpoint, network: str) -> tuple[nn.Module, PretrainConfig]:
    """A network of a checkpoint, on the CPU in fp32, and the config that it was trained with.

    network: "target", "context", "predictor", or another one that its objective trains. What an older
    checkpoint's config lacks means its default.
    Raises ValueError for a config that cannot be read, and for weights that are not there.
    """
    config, objective = _described(found)
    try:
        with torch.device("meta"):  # the checkpoint gives every weight: no memory, no random numbers before
            module = build.build_encoder(config) if network in ENCODERS else _trained(config, network)
        weights = _stored_weights(found, module, objective, network)
        module.load_state_dict(weights, strict=False, assign=True)  # the positions are the module's own
    except ValueError as error:
        raise ValueError(f"{found.path} cannot be loaded: {error}") from error
    return module, config


def _described(found: Checkpoint) -> tuple[PretrainConfig, Objective]:
    try:
        if not isinstance(found.manifest.get("config"), dict):
            raise ValueError(f"{checkpoints.MANIFEST} says nothing of its config")
        config = from_dict(found.manifest["config"])
        if (name := found.manifest.get("objective", config.objective.name)) not in build.OBJECTIVES:
            raise ValueError(f"it is of the objective {name}; known are: {', '.join(build.OBJECTIVES)}")
        return config, build.build_objective(config)
    except ValueError as error:
        raise ValueError(f"{found.path} cannot be loaded: {error}") from error


def _trained(config: PretrainConfig, network: str) -> nn.Module:
    objective = build.build_objective(replace(config, engine=EngineConfig()))  # compiles and recomputes nothing
    trained = objective.trained(objective.build())
    if network not in trained:
        raise ValueError(f"the objective {objective.name} has no {network}; it has {', '.join(trained)}")
    return trained[network]


def stored_names(objective: Objective, network: str) -> tuple[dict[str, str], str]:
    """Where a checkpoint holds a network: {a parameter's name in it: its full name}, and "master" or "ema".

    network: one of the objective's encoders, or of the networks that it trains. Raises ValueError for another.
    """
    with torch.device("meta"):  # for its names alone
        module = objective.build()
    trained = {id(average): parameter for parameter, average in objective.averaged(module)}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    networks = {**objective.trained(module), **objective.encoders(module)}
    if network not in networks:
        raise ValueError(f"the objective {objective.name} has no {network}; it has {', '.join(networks)}")
    parameters = dict(networks[network].named_parameters())
    stored = {name: names[id(trained.get(id(p), p))] for name, p in parameters.items()}
    return stored, "ema" if any(id(p) in trained for p in parameters.values()) else "master"


@torch.no_grad()
def read_weights(found: Checkpoint, module: nn.Module, objective: Objective, network: str) -> None:
    """Fill a plain network of the right size with a checkpoint's weights. ValueError where one is not there."""
    weights = _stored_weights(found, module, objective, network)
    for name, parameter in module.named_parameters():
        parameter.copy_(weights[name])


def _stored_weights(
    found: Checkpoint, module: nn.Module, objective: Objective, network: str
) -> dict[str, torch.Tensor]:
    """A network's weights by their names in it. ValueError where one is not there, or is of another size."""
    stored, kind = stored_names(objective, network)
    shapes = {stored[name]: parameter.shape for name, parameter in module.named_parameters()}
    weights = checkpoints.read_weights(found, shapes, kind)
    return {name: weights[stored[name]] for name, _ in module.named_parameters()}
