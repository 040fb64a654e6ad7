"""How a recipe scales over numbers of GPUs: a table and a picture, each number at its fastest setting that fits.

Strong: the recipe's global batch, whatever the GPUs. Weak: as many images a GPU as the fewest GPUs have of it, so the
global batch grows: that is another recipe, with fewer steps for the same epochs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ijepa_scale import build
from ijepa_scale.config import PretrainConfig
from ijepa_scale.plan.clusters import Cluster
from ijepa_scale.plan.sampling import is_fixed, sample
from ijepa_scale.plan.settings import Planned, Setting, fixed_micro_batch, plan
from ijepa_scale.plan.table import assumptions, listed, rendered
from ijepa_scale.plan.times import Assumed
from ijepa_scale.visualize.scaling import Scaling, draw_scaling

STRONG, WEAK = "strong", "weak"


@dataclass(frozen=True, kw_only=True)
class Point:
    """kind: strong or weak. planned, fastest: None where nothing can be run; why: then."""

    kind: str
    cluster: Cluster
    planned: Planned | None
    fastest: Setting | None
    why: str = ""

    @property
    def images_per_second(self) -> float:
        return self.planned.images_per_second(self.fastest) if self.planned and self.fastest else 0.0


def numbers_of(text: str) -> list[int]:
    """As `8,64,512`, ascending, each once. ValueError for other words."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"--sweep takes numbers of GPUs, as 8,64,512,4096; got {text!r}")
    return sorted({int(word) for word in words})


def sweep(
    config: PretrainConfig, clusters: Sequence[Cluster], assumed: Assumed, *, usable: float, path: str, name: str
) -> str:
    """The table in words; the picture goes to path. ValueError where the fewest GPUs cannot run the recipe.

    clusters: ascending. name: of the config.
    """
    if not path.endswith(".png"):
        raise ValueError(f"--out {path} must end in .png")
    points = [point for kind in (STRONG, WEAK) for point in points_of(config, kind, clusters, assumed, usable)]
    ran = [point for point in points if point.planned and point.fastest]
    if not ran or clusters[0] not in [point.cluster for point in ran]:
        raise ValueError(f"on {clusters[0].gpus} GPUs nothing fits; begin --sweep with more, or with larger ones")
    draw_scaling(path, f"{name} on {clusters[0].gpu}, by arithmetic", [_curve(ran, kind) for kind in (STRONG, WEAK)])
    assert ran[-1].planned is not None, "some ran"
    return "\n\n".join(
        [
            f"{name} on {clusters[0].gpu}: each number of GPUs at its fastest setting that fits.\n"
            "Strong: the recipe's global batch. Weak: it grows with the GPUs, which is another recipe.",
            rendered(*rows_of(points)),
            *sorted({f"{point.kind}, {point.cluster.gpus} GPUs: {point.why}" for point in points if point.why}),
            listed("Assumed", assumptions(ran[-1].planned, assumed)),
            f"picture: {path}",
        ]
    )


def points_of(
    config: PretrainConfig, kind: str, clusters: Sequence[Cluster], assumed: Assumed, usable: float
) -> list[Point]:
    """Strong scaling ends where the batch cannot be cut any further, weak where it takes all images; which is said."""
    first, whole = clusters[0].gpus, config.optimization.global_batch_size
    objective = build.build_objective(config)
    least = fixed_micro_batch(config, objective) or 1
    sampled = None if is_fixed(objective) else sample(objective, 1)
    found = []
    for cluster in clusters:
        batch, why = whole if kind == STRONG else whole // first * cluster.gpus, ""
        if batch % (cluster.gpus * least):
            why = f"a global batch of {batch} cannot be cut evenly among them" + f", by {least}" * (least > 1)
        elif 0 < config.data.num_images < batch:
            why = f"a global batch of {batch} is more than data.num_images={config.data.num_images}"
        if why and cluster.gpus != first:  # of the recipe itself plan() says what to do
            found.append(Point(kind=kind, cluster=cluster, planned=None, fastest=None, why=why))
            continue
        scaled = replace(config, optimization=replace(config.optimization, global_batch_size=batch))
        planned = plan(scaled, cluster, assumed, usable=usable, sampled=sampled)
        why = "" if planned.fastest else "nothing fits"
        found.append(Point(kind=kind, cluster=cluster, planned=planned, fastest=planned.fastest, why=why))
    return found


def efficiency(point: Point, points: Sequence[Point]) -> float:
    """Images a second and GPU over those of the fewest GPUs."""
    first = next(one for one in points if one.kind == point.kind)
    return (point.images_per_second / point.cluster.gpus) / (first.images_per_second / first.cluster.gpus)


def rows_of(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    heads = ["scaling", "GPUs", "setting", "batch", "img/s", "efficiency", "waiting", "hours", "GPU-h"]
    rows = []
    for point in points:
        if point.planned is None or point.fastest is None:
            rows.append([point.kind, f"{point.cluster.gpus:,}", "none", *["-"] * 6])
            continue
        one, hours = point.fastest, point.planned.hours(point.fastest)
        rows.append(
            [
                point.kind,
                f"{point.cluster.gpus:,}",
                f"ZeRO-{one.zero_stage}, {one.checkpointing}, {one.micro_batch} x {one.micro_steps}",
                f"{point.planned.images:,}",
                f"{point.images_per_second:,.0f}",
                f"{100 * efficiency(point, points):.0f}%",
                f"{100 * one.step.exposed / one.step.seconds:.1f}%",
                f"{hours:,.1f}",
                f"{hours * point.cluster.gpus:,.0f}",
            ]
        )
    return heads, rows


def _curve(points: Sequence[Point], kind: str) -> Scaling:
    own = [point for point in points if point.kind == kind]
    return Scaling(
        name=kind,
        gpus=[point.cluster.gpus for point in own],
        images_per_second=[point.images_per_second for point in own],
        efficiencies=[100 * efficiency(point, own) for point in own],
    )
