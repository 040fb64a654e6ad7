"""Frozen dataclasses, one per YAML section: the keys, their defaults and units, and what is refused.

A key that is free(), or lies in a section that is FREE, may change when a run is resumed. Every other key alters what
is trained.
"""

import os
import re
from dataclasses import dataclass, field, fields
from typing import Any

from ijepa_scale.config import ranges
from ijepa_scale.config.objective_sections import CaeConfig, Data2VecConfig, MaeConfig, SketchConfig
from ijepa_scale.config.ranges import NO_LIMIT, check_choice, check_ranges
from ijepa_scale.config.reading import FREE, NUMBERS_TOO


def free(default: Any) -> Any:
    """A key that may change on resume: it does not change what is trained."""
    return field(default=default, metadata=FREE)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _expand_user(section: Any, key: str, name: str) -> None:
    """Put the home folder in the place of ~ in a section's path, as the shell does where it sees one."""
    path = os.path.expanduser(getattr(section, key))
    _require(path.split("/")[0] != "~", f"{name}: no home folder is known for {path}; give another")
    object.__setattr__(section, key, path)  # as the dataclass itself sets a frozen field


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    # "scenes", a folder (Parquet, Arrow, tars, images in any tree, a table of paths), one such file, a hub id, or, when
    # streaming, URLs with braces; or several, mixed by weight: [{path: /data/a, weight: 3}, {path: /data/b, weight: 1}]
    source: Any = ""
    split: str = "train"
    column: str = ""  # of the images, where several hold some; in tars their ending, as seg.png; "": the likeliest
    config: str = ""  # of a data set that has several configurations, as its card lists them
    eval_split: str = free("")  # labelled images of the report; "": one called validation, test or so, else `split`
    image_size: int = 224  # pixels, side of the square crop
    crop_scale: tuple[float, float] = (0.3, 1.0)  # area of the random crop / area of the image
    horizontal_flip: bool = False
    workers: int = free(8)  # loader processes a rank; 0 loads in the training process
    streaming: bool = False  # read shards front to back, from disk or over the network, and copy nothing
    shuffle_buffer: int = 1000  # images a loader process holds to shuffle a stream
    retry_seconds: float = free(300.0)  # how long a stream waits for a network that fails, before the run ends
    num_images: int = 0  # scenes: how many to render; streams, --dry-run: images of an epoch, where that is not known
    cache_dir: str = free("")  # where rendered scenes and the copies made by `datasets` go; "": their default folders
    # Of an image as it is decoded; 0: any number. JPEG and JPEG 2000 are decoded at a half of their sides or less from
    # 179 million on; a pixel takes 4 bytes or more in a loader process. Free, to be raised where it stops a run: which
    # images are left out is told
    max_pixels: int = free(500_000_000)
    max_bad_fraction: float = free(0.01)  # of the source's images that may be unreadable before the run stops

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        _require(0.0 < low <= high <= 1.0, f"data.crop_scale must satisfy 0 < low <= high <= 1, got {[low, high]}")
        _require(bool(self.split.strip()), f"data.split must name a split, as train, got {self.split!r}")
        check_ranges(
            "data",
            self,
            image_size=(1, ranges.PIXELS),
            workers=(0, ranges.PROCESSES),
            num_images=(0, NO_LIMIT),
            shuffle_buffer=(1, NO_LIMIT),
            max_pixels=(0, NO_LIMIT),  # 0: any number
            retry_seconds=(0, ranges.SECONDS),
        )
        _require(
            isinstance(self.source, str | list) and self.source != [],
            f"config key data.source: wants text, or a list of several sources, got {self.source!r}",
        )
        _expand_user(self, "cache_dir", "data.cache_dir")
        _ = self.mixed_sources  # checks each of a list
        in_range = 0.0 <= self.max_bad_fraction <= 1.0
        _require(in_range, f"data.max_bad_fraction must lie in 0..1, got {self.max_bad_fraction}")

    @property
    def mixed_sources(self) -> list[tuple[str, float]]:
        """(path, weight) of each source; of one alone the weight says nothing."""
        if not isinstance(self.source, list):
            return [(self.source, 1.0)] if self.source else []
        for part in self.source:
            fits = isinstance(part, dict) and {"path"} <= part.keys() <= {"path", "weight"}
            weight = part.get("weight", 1) if fits else None
            fits = isinstance(weight, int | float) and weight is not True and 0 < weight < float("inf")
            _require(
                fits and isinstance(part["path"], str) and bool(part["path"]),
                "config key data.source: a list wants {path: ..., weight: ...} for each, the weight above 0 and a "
                "space after each colon, as [{path: /data/a, weight: 3}, {path: /data/b, weight: 1}]; "
                f"got {part!r}",
            )
        return [(part["path"], part.get("weight", 1)) for part in self.source]


ATTENTION = ("auto", "fa2", "fa3", "fa4", "torch_varlen", "triton", "sdpa")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str = "vit_huge"  # a key of models.vit.VIT_SIZES
    patch_size: int = 14  # pixels
    width: int = 0  # 0: as the name says; likewise the next three
    depth: int = 0
    heads: int = 0
    mlp_width: int = 0  # 0: as the name says, or 4 x width where width is given
    # auto | fa2 | fa3 | fa4 | torch_varlen | triton | sdpa: what attends over packed tokens; beyond rounding it
    # changes nothing
    attention: str = free("auto")
    # Continued pre-training: what exchange.load() reads, as a run folder, whose weights step 0 has; "": random ones.
    # Free, as a run that is resumed does not read it again: it may have moved, or be gone
    init_from: str = free("")

    def __post_init__(self) -> None:
        _expand_user(self, "init_from", "model.init_from")
        check_choice("model", self, attention=ATTENTION)
        check_ranges(
            "model",
            self,
            patch_size=(1, ranges.PIXELS),
            width=(0, ranges.WIDTH),
            depth=(0, ranges.DEPTH),
            heads=(0, ranges.WIDTH),
            mlp_width=(0, ranges.MLP_WIDTH),
        )


# The sections of each objective. A config sets those of its own objective alone.
OBJECTIVE_SECTIONS = {
    "ijepa": ("mask", "loss", "predictor"),
    "data2vec": ("data2vec", "predictor"),
    "mae": ("mae",),
    "cae": ("cae",),
    "sketch": ("sketch", "predictor", "loss"),
}


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    name: str = "ijepa"  # a key of OBJECTIVE_SECTIONS: what is learned from a batch

    def __post_init__(self) -> None:
        check_choice("objective", self, name=tuple(OBJECTIVE_SECTIONS))


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    width: int = 384
    depth: int = 12
    heads: int = 0  # 0: the encoder's, as in the paper; of a width of 384 GPUs prefer 12 or 6 (docs/speed.md)
    attention: str = free("")  # as model.attention, of the predictor; "": its value

    def __post_init__(self) -> None:
        check_ranges("predictor", self, width=(1, ranges.WIDTH), depth=(1, ranges.DEPTH), heads=(0, ranges.WIDTH))
        _require(
            self.attention in ("", *ATTENTION),
            f"predictor.attention must be one of {', '.join(ATTENTION)}, or empty: as model.attention; "
            f"got {self.attention!r}",
        )


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    num_target_blocks: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)  # area of a target block / area of the patch grid
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5)  # height / width
    context_scale: tuple[float, float] = (0.85, 1.0)  # area of the context block / area of the patch grid
    min_keep: int = 10  # patches; every target block and every context keeps at least as many
    context: str = field(default="all", metadata=NUMBERS_TOO)  # all | batch_min | patches an image
    reference_compat: bool = False  # restores the reference's off-by-one: no block reaches the last row or column

    def __post_init__(self) -> None:
        for key in ("target_scale", "context_scale"):
            low, high = getattr(self, key)
            _require(0.0 < low <= high <= 1.0, f"mask.{key} must satisfy 0 < low <= high <= 1, got {[low, high]}")
        low, high = self.target_aspect_ratio
        _require(
            1e-3 <= low <= high <= 1e3,
            f"mask.target_aspect_ratio must satisfy 0.001 <= low <= high <= 1000, got {[low, high]}",
        )
        check_ranges("mask", self, num_target_blocks=(1, ranges.BLOCKS), min_keep=(1, NO_LIMIT))
        budget = bool(re.fullmatch(r"0*[1-9][0-9]{0,17}", self.context))
        _require(
            self.context in ("all", "batch_min") or budget,
            f"mask.context must be all, batch_min or a number of patches an image, got {self.context!r}",
        )


def _block_numbers(key: str, value: Any) -> str | tuple[int, ...]:
    """Block numbers, a word as every_4, or "" for none. From a command line a list comes as text."""
    if isinstance(value, str) and re.fullmatch(r"\d+|\[\s*(\d+\s*(,\s*\d+\s*)*)?\]", value):
        value = [int(number) for number in re.findall(r"\d+", value)]
    numbers = [value] if type(value) is int else list(value) if isinstance(value, list | tuple) else None
    if numbers is None:
        fits = isinstance(value, str) and bool(re.fullmatch(r"(every_[1-9]\d*)?", value))
    else:
        fits = all(type(number) is int and number >= 1 for number in numbers) and numbers == sorted({*numbers})
    _require(
        fits,
        f"{key} must be block numbers counted from 1, ascending and each once, as [2, 4, 6], or every_N with N from 1, "
        f"as every_4, or empty: the last output alone; got {value!r}",
    )
    return value if numbers is None else tuple(numbers) or ""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    kind: str = "smooth_l1"  # smooth_l1 (as the released code) | l2 (as the paper's text)
    # Weights of terms against collapse, over the images of one micro-step of all ranks; 0: off, as in the paper.
    # variance: of how far the standard deviations of the context tokens fall short of 1; small runs: 0.01, 0.02
    variance: float = 0.0
    covariance: float = 0.0  # of the squared covariances between their dimensions; small runs: a fifth of variance
    # Blocks of the target encoder whose outputs are predicted, counted from 1 (Bootleg, arXiv:2603.15553): [2, 4, 6] or
    # every_4: every fourth, back from the last; "": the last output alone, as in the paper
    target_layers: Any = field(default="", metadata=NUMBERS_TOO)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_layers", _block_numbers("loss.target_layers", self.target_layers))
        check_ranges("loss", self, variance=(0, NO_LIMIT), covariance=(0, NO_LIMIT))
        check_choice("loss", self, kind=("smooth_l1", "l2"))


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    global_batch_size: int = 2048  # images an optimizer step, over all ranks and accumulation steps
    micro_batch_size: int = free(0)  # images one rank runs in one forward; 0: global_batch_size / ranks
    epochs: int = 300
    max_steps: int = 0  # the schedules' horizon; 0: epochs x floor(images / global_batch_size)
    stop_at_step: int = free(0)  # ends the run early without touching the schedules; 0: at the horizon
    warmup_epochs: float = 40.0  # linear warm-up, over warmup_epochs / epochs of the horizon
    # adamw, or muon: that for the matrices of transformer blocks, AdamW for all else
    optimizer: str = "adamw"
    start_lr: float = 2e-4  # at step 0 of the warm-up
    lr: float = 1e-3  # at the warm-up's end, then cosine
    final_lr: float = 1e-6
    weight_decay: tuple[float, float] = (0.04, 0.4)  # cosine from, to; none on biases and 1-D parameters
    ema: tuple[float, float] = (0.996, 1.0)  # momentum of the target encoder, linear from, to
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad_norm: float = 0.0  # 0: off

    def __post_init__(self) -> None:
        check_ranges(
            "optimization",
            self,
            global_batch_size=(1, ranges.BATCH),
            micro_batch_size=(0, ranges.BATCH),
            epochs=(1, ranges.EPOCHS),
            max_steps=(0, ranges.STEPS),
            stop_at_step=(0, ranges.STEPS),
            **dict.fromkeys(("start_lr", "lr", "final_lr", "weight_decay"), (0, ranges.LEARNING_RATE)),
            clip_grad_norm=(0, NO_LIMIT),
        )
        check_choice("optimization", self, optimizer=("adamw", "muon"))
        _require(
            0 <= self.warmup_epochs <= self.epochs,
            f"optimization.warmup_epochs must lie in 0..epochs ({self.epochs}), got {self.warmup_epochs}",
        )
        _require(
            all(0.0 <= beta < 1.0 for beta in self.betas),
            f"optimization.betas must lie in 0..1 (1 excluded), got {list(self.betas)}",
        )
        low, high = self.ema
        _require(0.0 <= low <= high <= 1.0, f"optimization.ema must satisfy 0 <= start <= end <= 1, got {[low, high]}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    zero_stage: int = free(1)  # 1, 2 or 3
    precision: str = "auto"  # auto (bf16 on a GPU, fp32 on CPU) | fp32 | bf16
    gradient_dtype: str = "fp32"  # in which ranks send gradients to one another: fp32 | bf16 (half the bytes)
    # none | predictor (its blocks, or a decoder's) | every_2, ... (also every Nth of the context encoder) | full
    activation_checkpointing: str = free("none")
    # none | cpu: masters, moments and EMA in the host's memory, and the optimizer's step there
    offload_optimizer: str = free("none")
    compile: bool = free(False)  # torch.compile of the transformer blocks
    hang_seconds: float = free(1800.0)  # a step with its save that takes longer ends the run, with all stacks; 0: off
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged last into the generated DeepSpeed config

    def __post_init__(self) -> None:
        _require(
            self.zero_stage in (1, 2, 3),
            f"engine.zero_stage must be 1, 2 or 3, got {self.zero_stage}"
            + (": stage 0 has no fp32 master weights to average; use 1" if self.zero_stage == 0 else ""),
        )
        check_ranges("engine", self, hang_seconds=(0, ranges.SECONDS))
        check_choice("engine", self, precision=("auto", "fp32", "bf16"), gradient_dtype=("fp32", "bf16"))
        check_choice("engine", self, offload_optimizer=("none", "cpu"))
        _ = self.recompute_every

    @property
    def recompute_every(self) -> tuple[int, int]:
        """Every which block of the context encoder and of the predictor is computed again in backward; 0: none."""
        fixed = {"none": (0, 0), "predictor": (0, 1), "full": (1, 1)}
        if self.activation_checkpointing in fixed:
            return fixed[self.activation_checkpointing]
        number = self.activation_checkpointing.removeprefix("every_")
        _require(
            self.activation_checkpointing.startswith("every_")
            and bool(re.fullmatch(r"[1-9][0-9]{0,8}", number))
            and int(number) >= 2,
            "engine.activation_checkpointing must be none, predictor, full, or every_N with N from 2 (every_2: every "
            f"second block of the context encoder), got {self.activation_checkpointing!r}",
        )
        return int(number), 1


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    keep_last: int = 2  # newest checkpoints kept
    keep_every: int = 0  # besides, every checkpoint whose step is a multiple of this is kept; 0: none
    # Training waits for a copy of the state in the host's memory alone, which is written beside the steps that follow.
    asynchronous: bool = False

    def __post_init__(self) -> None:
        check_ranges("checkpoint", self, every_steps=(1, NO_LIMIT), keep_last=(1, NO_LIMIT), keep_every=(0, NO_LIMIT))


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    wandb: str = "disabled"  # disabled | offline | online
    wandb_project: str = "ijepa-scale"
    health_every_steps: int = 500  # feature std, RankMe, drift, k-NN; 0: off
    health_images: int = 512
    pictures_every_steps: int = 0  # the same few images in the colours of their features, to RUN/pictures; 0: off

    def __post_init__(self) -> None:
        check_choice("logging", self, wandb=("disabled", "offline", "online"))
        check_ranges(
            "logging",
            self,
            health_every_steps=(0, NO_LIMIT),
            pictures_every_steps=(0, NO_LIMIT),
            health_images=(32, NO_LIMIT),
        )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    train_images: int = 4000  # labelled images the probes are fitted on; 0: no report
    test_images: int = 2000

    def __post_init__(self) -> None:
        check_ranges("report", self, train_images=(0, NO_LIMIT), test_images=(0, NO_LIMIT))


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data2vec: Data2VecConfig = field(default_factory=Data2VecConfig)
    mae: MaeConfig = field(default_factory=MaeConfig)
    cae: CaeConfig = field(default_factory=CaeConfig)
    sketch: SketchConfig = field(default_factory=SketchConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=FREE)
    logging: LoggingConfig = field(default_factory=LoggingConfig, metadata=FREE)
    report: ReportConfig = field(default_factory=ReportConfig, metadata=FREE)
    run_dir: str = free("")  # "": runs/<name of the config file>
    seed: int = 0

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**63, f"seed must be 0 or more and less than 2**63, got {self.seed}")
        _expand_user(self, "run_dir", "run_dir")
        _require(
            self.data.image_size % self.model.patch_size == 0,
            f"data.image_size {self.data.image_size} is not a multiple of model.patch_size {self.model.patch_size}",
        )
        side = self.data.image_size // self.model.patch_size
        _require(
            side**2 <= ranges.PATCHES,
            f"data.image_size {self.data.image_size} with model.patch_size {self.model.patch_size} makes {side**2:,} "
            f"patches, more than {ranges.PATCHES:,}; use smaller images or larger patches",
        )
        _require(
            self.objective.name != "sketch" or not self.model.init_from,
            f"model.init_from={self.model.init_from}: a sketch's encoder is that of sketch.checkpoint, and its decoder "
            "starts fresh; leave model.init_from out",
        )
        self._refuse_sections_of_other_objectives()

    def _refuse_sections_of_other_objectives(self) -> None:
        own = OBJECTIVE_SECTIONS[self.objective.name]
        usual: Any = {item.name: item.default_factory for item in fields(self)}
        for other, sections in OBJECTIVE_SECTIONS.items():
            for name in sections:
                _require(
                    name in own or getattr(self, name) == usual[name](),
                    f"the section {name} is of objective.name={other} and this is {self.objective.name}, which takes "
                    f"{', '.join(own)}; leave {name} out, or set objective.name",
                )
