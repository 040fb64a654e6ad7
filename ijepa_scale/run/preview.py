"""A picture of what the networks see, drawn before the first step."""

from ijepa_scale.run.setup import Run
from ijepa_scale.visualize.masks import draw_masks

MASK_PREVIEW_IMAGES = 8


def preview_masks(run: Run) -> None:
    """masks.png: what the networks see of the run's first images, where they do not see all."""
    batch = run.dataset.preview(run.start_step)
    count = min(MASK_PREVIEW_IMAGES, len(batch.indices))
    shown = run.objective.shown(batch.masks)[:count]
    if not any(one.hidden for one in shown):
        return
    draw_masks(
        run.folder.path / "masks.png",
        batch.images[:count].numpy(),
        *run.objective.grid.shape,
        [one.seen for one in shown],
        [one.hidden for one in shown],
    )
