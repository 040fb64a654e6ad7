"""Sections of the config -> what is learned: an objective, and the sizes of its networks. build.py has these, too."""

from collections.abc import Callable
from typing import Any

from ijepa_scale.config import MaskConfig, ModelConfig, PretrainConfig
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.multiblock import MultiBlock
from ijepa_scale.models.blocks import ViTSize
from ijepa_scale.models.vit import VIT_SIZES
from ijepa_scale.objectives.cae import CaeObjective
from ijepa_scale.objectives.data2vec import Data2VecObjective
from ijepa_scale.objectives.ijepa import IJepaObjective
from ijepa_scale.objectives.mae import MaeObjective
from ijepa_scale.objectives.masks import BlockMasks, HiddenMasks, InverseBlockMasks
from ijepa_scale.objectives.objective import Objective
from ijepa_scale.objectives.sketch import SketchDraws, SketchObjective


def vit_size(model: ModelConfig) -> ViTSize:
    """The named size, with any explicit width, depth, heads and mlp_width over it."""
    if model.name not in VIT_SIZES:
        raise ValueError(f"unknown model.name {model.name!r}; choose one of {', '.join(VIT_SIZES)}")
    named = VIT_SIZES[model.name]
    return _size(
        "model.width, model.depth, model.heads and model.mlp_width",
        width=model.width or named.width,
        depth=model.depth or named.depth,
        heads=model.heads or named.heads,
        mlp_width=model.mlp_width or (4 * model.width if model.width else named.mlp_width),
    )


def predictor_size(config: PretrainConfig) -> ViTSize:
    model = config.predictor
    heads = model.heads or vit_size(config.model).heads
    return _size(
        "predictor.width, predictor.depth and predictor.heads (of 0 the encoder's)",
        width=model.width,
        depth=model.depth,
        heads=heads,
        mlp_width=4 * model.width,
    )


def _size(keys: str, **sizes: int) -> ViTSize:
    """ValueError, which names the keys, for sizes that make no transformer."""
    try:
        return ViTSize(**sizes)
    except ValueError as error:
        raise ValueError(f"{keys}: {error}") from error


def target_layers(config: PretrainConfig) -> tuple[int, ...]:
    """loss.target_layers in numbers; of every_N those that lie a multiple of N before the last; (): the last alone."""
    layers, depth = config.loss.target_layers, vit_size(config.model).depth
    if isinstance(layers, str):
        every = int(layers.removeprefix("every_") or depth)
        return tuple(range(depth, 0, -every))[::-1]
    return layers


def build_objective(config: PretrainConfig) -> Objective:
    """What objective.name asks for. ValueError for an unknown model; objective.check() refuses what cannot be met."""
    return OBJECTIVES[config.objective.name](config)


def build_ijepa(config: PretrainConfig) -> IJepaObjective:
    """I-JEPA; ValueError for a config of another objective, as benchmarks of its step may be given."""
    if config.objective.name != "ijepa":
        raise ValueError(f"this is of objective.name=ijepa alone, got {config.objective.name}; give such a config")
    return IJepaObjective(
        predictor=predictor_size(config),
        draw_masks=BlockMasks(build_blocks(config), config.mask.context, config.seed),
        loss_kind=config.loss.kind,
        variance=config.loss.variance,
        covariance=config.loss.covariance,
        target_layers=target_layers(config),
        **_shared(config),
    )


def build_blocks(config: PretrainConfig) -> MultiBlock:
    """The blocks that masks are made of; objective.check() refuses those that cannot be drawn."""
    mask: MaskConfig = config.mask
    return MultiBlock(
        grid=_grid(config),
        num_target_blocks=mask.num_target_blocks,
        target_scale=mask.target_scale,
        target_aspect_ratio=mask.target_aspect_ratio,
        context_scale=mask.context_scale,
        min_keep=mask.min_keep,
        reference_compat=mask.reference_compat,
    )


def build_data2vec(config: PretrainConfig) -> Data2VecObjective:
    """ValueError where none or all of the patches would be visible."""
    options, grid = config.data2vec, _grid(config)
    visible = grid.num_patches - round(options.mask_ratio * grid.num_patches)
    if not 0 < visible < grid.num_patches:
        raise ValueError(
            f"data2vec.mask_ratio {options.mask_ratio} leaves {visible} of {grid.num_patches} patches visible; some "
            "must be hidden and some visible: use another, or smaller patches (model.patch_size)"
        )
    return Data2VecObjective(
        predictor=predictor_size(config),
        draw_masks=InverseBlockMasks(grid, visible, options.block_side, options.masks_an_image, config.seed),
        loss_kind=options.loss,
        top_layers=options.top_layers,
        **_shared(config),
    )


def build_mae(config: PretrainConfig) -> MaeObjective:
    options = config.mae
    return MaeObjective(
        decoder=_size(
            "mae.decoder_width, mae.decoder_depth and mae.decoder_heads",
            width=options.decoder_width,
            depth=options.decoder_depth,
            heads=options.decoder_heads,
            mlp_width=4 * options.decoder_width,
        ),
        draw_masks=build_hidden(config, options.mask_ratio),
        **_shared(config),
    )


def build_cae(config: PretrainConfig) -> CaeObjective:
    options = config.cae
    return CaeObjective(
        regressor_depth=options.regressor_depth,
        decoder_depth=options.decoder_depth,
        alignment=options.alignment,
        draw_masks=build_hidden(config, options.mask_ratio, in_blocks=True),
        **_shared(config),
    )


def build_sketch(config: PretrainConfig) -> SketchObjective:
    options = config.sketch
    size = _size(
        "sketch.width, sketch.depth and sketch.heads",
        width=options.width,
        depth=options.depth,
        heads=options.heads,
        mlp_width=4 * options.width,
    )
    return SketchObjective(
        decoder=size,
        predictor=predictor_size(config) if options.kind == "flow" else None,
        layers=target_layers(config) or (vit_size(config.model).depth,),
        condition=options.condition,
        perceptual=options.perceptual,
        draw_masks=SketchDraws(
            _grid(config), options.noise, options.box_scale if options.kind == "flow" else None, config.seed
        ),
        **_shared(config),
    )


def build_hidden(config: PretrainConfig, ratio: float, *, in_blocks: bool = False) -> HiddenMasks:
    """A share of the patches hidden. ValueError where these would be none or all."""
    grid = _grid(config)
    hidden = round(ratio * grid.num_patches)
    if not 0 < hidden < grid.num_patches:
        raise ValueError(
            f"{config.objective.name}.mask_ratio {ratio} hides {hidden} of {grid.num_patches} patches; some must be "
            "hidden and some seen: use another, or smaller patches (model.patch_size)"
        )
    return HiddenMasks(grid, hidden, in_blocks, config.seed)


def _shared(config: PretrainConfig) -> dict[str, Any]:
    """What every objective is given."""
    return {
        "encoder": vit_size(config.model),
        "image_size": config.data.image_size,
        "patch_size": config.model.patch_size,
        "recompute_every": config.engine.recompute_every,
        "compiled": config.engine.compile,
        "seed": config.seed,
    }


def _grid(config: PretrainConfig) -> PatchGrid:
    side = config.data.image_size // config.model.patch_size
    return PatchGrid(side, side)


OBJECTIVES: dict[str, Callable[[PretrainConfig], Objective]] = {
    "ijepa": build_ijepa,
    "data2vec": build_data2vec,
    "mae": build_mae,
    "cae": build_cae,
    "sketch": build_sketch,
}
