"""model.init_from: training that starts from the weights of another run, or of a file of another project.

The first rank reads, one network after another, and hands each parameter to the others: they need not see the files.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ijepa_scale import build
from ijepa_scale.config import PretrainConfig
from ijepa_scale.engine import checkpoint as checkpoints
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.engine.ema import ShardedEMA
from ijepa_scale.exchange.load import load, source_of
from ijepa_scale.exchange.networks import Loaded
from ijepa_scale.exchange.run import stored_names
from ijepa_scale.models.positions import sincos_pos_embed
from ijepa_scale.models.vit import VIT_SIZES, VisionTransformer
from ijepa_scale.objectives.objective import Objective

WORDS = {"context": "context encoder", "target": "target encoder", "predictor": "predictor"}
POSITION_TOLERANCE = 1e-2  # of embeddings that were rounded to bf16; learned ones differ by far more
Facts = dict[str, dict[str, str]]  # by the objective's networks: path, network and sha256 of what each started from


@dataclass(frozen=True)
class Part:
    """A network of an objective. own: for its shapes. stored, kind: as stored_names() has them."""

    name: str
    own: nn.Module
    stored: dict[str, str]
    kind: str


def parts_of(objective: Objective) -> tuple[list[Part], list[str]]:
    """The networks that may start from a source, and the names of those that it trains besides, which start fresh."""
    with torch.device("meta"):  # for its shapes alone
        module = objective.build()
    trained = objective.trained(module)
    named = {**trained, **objective.encoders(module)}
    parts = [Part(name, named[name], *stored_names(objective, name)) for name in WORDS if name in named]
    filled = {full for part in parts for full in part.stored.values()}
    full = {id(parameter): name for name, parameter in module.named_parameters()}
    others = [name for name, other in trained.items() if not filled & {full[id(p)] for p in other.parameters()}]
    return parts, others


def read_part(config: PretrainConfig, part: Part) -> tuple[Loaded | None, str]:
    """What a network starts from, and which of the source's that is; None and why where it starts fresh.

    Raises ValueError where model.init_from is not there, or its encoder does not fit.
    """
    try:
        loaded = load(config.model.init_from, part.name)
    except ValueError as error:
        if part.name == "predictor":  # an encoder was read before it: there is no predictor
            return None, str(error)
        raise ValueError(f"model.init_from: {error}") from error
    if part.name == "predictor":
        differing = differing_sizes(part.own, loaded.network)
        return (None, f"that one is another: {differing[0]}") if differing else (loaded, loaded.name)
    check_fits(config, part.own, loaded, f"model.init_from={config.model.init_from}")
    return loaded, loaded.name


def check(config: PretrainConfig, objective: Objective) -> None:
    """Raise ValueError where model.init_from is not there or its encoder does not fit, before what takes long."""
    parts, _ = parts_of(objective)
    read_part(config, parts[0])


def check_fits(config: PretrainConfig, own: nn.Module, loaded: Loaded, given: str) -> None:
    """Raise ValueError for an encoder of other sizes, naming what would fit, and for learned position embeddings.

    given: the key and the value that name it, in words.
    """
    theirs: Any = loaded.network
    differing = differing_sizes(own, theirs)
    if differing:
        listed = "; ".join(differing[:6]) + f"; and {len(differing) - 6} more" * (len(differing) > 6)
        raise ValueError(
            f"{given} does not fit this config: {listed}; to start from it give "
            f"{' '.join(overrides_for(config, theirs, loaded.image_size))}, or choose another source"
        )
    fixed_ND = sincos_pos_embed(theirs.size.width, theirs.grid)
    difference = (theirs.pos_embed[0] - fixed_ND).abs().max().item()
    if not difference <= POSITION_TOLERANCE:
        raise ValueError(
            f"{given} has position embeddings of its own, up to {difference:.2g} from the fixed sine-cosine ones that "
            "are trained with here; choose another source"
        )


def differing_sizes(own: Any, theirs: Any) -> list[str]:
    """In words, what keeps one network's weights from being the other's: sizes, then names and shapes."""
    sizes = [
        f"{key} {getattr(theirs.size, key)} there, {getattr(own.size, key)} here"
        for key in ("width", "depth", "heads", "mlp_width")
        if getattr(theirs.size, key) != getattr(own.size, key)
    ]
    if isinstance(own, VisionTransformer) and own.patch_embed.patch_size != theirs.patch_embed.patch_size:
        sizes.append(f"patch size {theirs.patch_embed.patch_size} there, {own.patch_embed.patch_size} here")
    here, there = (
        {name: tuple(parameter.shape) for name, parameter in network.named_parameters()} for network in (own, theirs)
    )
    names = [*here, *(name for name in there if name not in here)]
    shapes = [
        f"{name} {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
        for name in names
        if here.get(name) != there.get(name)
    ]
    return sizes + shapes


def overrides_for(config: PretrainConfig, encoder: VisionTransformer, image_size: int) -> list[str]:
    """The key.sub=value words that give a config an encoder's sizes: its name where it has one, else each size."""
    size, patch_size = encoder.size, encoder.patch_embed.patch_size
    keys = ("width", "depth", "heads", "mlp_width")
    named = [name for name, known in VIT_SIZES.items() if known == size]
    if named:
        words = [f"model.name={named[0]}", *(f"model.{key}=0" for key in keys if getattr(config.model, key))]
    elif build.vit_size(config.model) != size:
        words = [f"model.{key}={getattr(size, key)}" for key in keys]
    else:
        words = []
    words.append(f"model.patch_size={patch_size}")
    if config.data.image_size % patch_size:
        words.append(f"data.image_size={image_size}")
    return words


class Account:
    """What starts from what: in words, and as a checkpoint keeps it (facts)."""

    def __init__(self, config: PretrainConfig) -> None:
        self.facts: Facts = {}
        self._config, self._said, self._notes = config, list[str](), list[str]()
        self._head = self._end = ""

    def add(self, name: str, loaded: Loaded | None, which: str) -> None:
        """Take up what read_part() gave for a part."""
        if loaded is None:
            self._said.append(f"{WORDS[name]} fresh ({which})")
            return
        self._said.append(f"{WORDS[name]} from its {WORDS[which]}")
        step = f" at step {loaded.step}" if loaded.step is not None else ""
        self._head = f"model.init_from: {loaded.path}{step}: "
        here = self._config.data.image_size
        if loaded.image_size != here:
            self._end = f"; position embeddings are for {here} px, there they are for {loaded.image_size} px"
        self._notes += [note for note in loaded.notes if note not in self._notes]
        path = source_of(self._config.model.init_from, loaded)
        self.facts[name] = {"path": path, "network": which, "sha256": loaded.sha256}

    def lines(self, others: list[str]) -> list[str]:
        """What to tell: what the loader says, one line, advice. others: what starts fresh, too."""
        said = self._said + [f"{name} fresh" for name in others]
        return [*self._notes, self._head + ", ".join(said) + self._end, *_advice(self._config)]


def _advice(config: PretrainConfig) -> list[str]:
    """Where the learning rate begins at its height; else nothing."""
    if config.optimization.warmup_epochs:
        return []
    epochs = max(1, config.optimization.epochs // 20)
    return [
        "advice: no warm-up is configured, and the optimizer starts without moments: its first steps at the full "
        f"learning rate can undo what was learned; set optimization.warmup_epochs={epochs} or so"
    ]


def preview(config: PretrainConfig) -> list[str]:
    """What a run that starts anew would say of model.init_from, by the same checks; one network in memory at a time."""
    if not config.model.init_from:
        return []
    account, (parts, others) = Account(config), parts_of(build.build_objective(config))
    for part in parts:
        account.add(part.name, *read_part(config, part))
    return account.lines(others)


def begin(
    config: PretrainConfig, objective: Objective, ranks: Ranks, engine: Any, ema: ShardedEMA
) -> tuple[Facts, list[str]]:
    """Give a run its first weights. What a checkpoint is to keep of it, and what to tell the user. All ranks call it.

    Raises ValueError, on every rank, as read_part() does.
    """
    account, (parts, others) = Account(config), parts_of(objective)

    def weights() -> Iterator[tuple[str, str, torch.Tensor]]:
        for part in parts:
            read = functools.partial(read_part, config, part) if ranks.first else _elsewhere
            loaded, which = ranks.together(read)
            if ranks.first:
                account.add(part.name, loaded, which)
            for name, values in handed_round(ranks, loaded):
                yield part.kind, part.stored[name], values
            del loaded  # before the next one is read

    checkpoints.replace_weights(engine, ema, weights())
    said = account.lines(others) if ranks.first else []
    return ranks.from_first(account.facts), said


def _elsewhere() -> tuple[None, str]:
    """What ranks but the first read."""
    return None, ""


def handed_round(ranks: Ranks, loaded: Loaded | None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, values) of each parameter of the network that the first rank has read, if any; on all ranks."""
    parameters = dict(loaded.network.named_parameters()) if loaded else {}
    for name in ranks.from_first(list(parameters)):
        # A copy: of a view all that it looks at would be sent.
        yield name, ranks.from_first(parameters[name].detach().clone() if parameters else torch.empty(0))


@torch.no_grad()
def fill_initial(encoder: nn.Module, objective: Objective, network: str, ranks: Ranks, facts: Facts) -> str:
    """Give an encoder the weights that its training started from; what they are, in words. All ranks call it.

    network: its name among objective.encoders(). facts: what begin() gave, or {}. Where the source has gone or changed
    they are random ones, and the words say so.
    """
    known = facts.get(network)
    read = functools.partial(_again, known) if known and ranks.first else _elsewhere
    loaded, why = ranks.together(read)
    parameters = dict(encoder.named_parameters())
    filled = False
    for name, values in handed_round(ranks, loaded):
        parameters[name].copy_(values)
        filled = True
    if known and filled:
        return f"the weights that training started from, of {known['path']}"
    stored, _ = stored_names(objective, network)
    for name, parameter in parameters.items():
        parameter.copy_(objective.initial_weight(stored[name], parameter.shape))
    return f"random weights, not those that training started from: {why}" if known else "the encoder's random weights"


def _again(known: dict[str, str]) -> tuple[Loaded | None, str]:
    """What training started from, or None and why it is no longer there."""
    try:
        loaded = load(known["path"], known["network"])
    except (ValueError, OSError) as error:  # training is done: its report is made all the same, and says so
        return None, str(error)
    return (loaded, "") if loaded.sha256 == known["sha256"] else (None, f"{known['path']} has changed since")
