"""Pictures of the same images while training goes on: how their patches come to be told apart, step by step."""

import time
from pathlib import Path

import numpy as np

from ijepa_scale.build import PICTURED
from ijepa_scale.data.decoding import BadImageError
from ijepa_scale.data.files import written_whole
from ijepa_scale.data.order import permuted_index
from ijepa_scale.data.transforms import center_crop
from ijepa_scale.evals.extract import extract
from ijepa_scale.run.incidents import Log, Say
from ijepa_scale.run.setup import Run
from ijepa_scale.visualize.features import busiest_patches, colours, draw_step, pca_scores, similarity, turned
from ijepa_scale.visualize.sheet import describe

CHOICE = 0x766973  # the stream of random numbers that images of pictures are drawn from: visualize shows the same
SHOWN = 6  # images; as many as visualize shows
NAME = "features-step-{:08d}"
OURS = "features-step-" + "[0-9]" * 8
ENDINGS = ("png", "json", "npz")  # npz: the scores that the next picture's colours are turned to
TITLE = "Patch features while training"


def cut_back(folder: Path, start_step: int) -> None:
    """Delete the pictures of a run, those in its folder, that are of steps which it trains anew."""
    for path in [path for ending in ENDINGS for path in (folder / "pictures").glob(f"{OURS}.{ending}")]:
        if step_of(path) > start_step or start_step == 0:
            path.unlink()


class StepPictures:
    """Draws now and then, on the first rank. What keeps it from that is told, and training goes on."""

    def __init__(self, run: Run, log: Log, say: Say) -> None:
        self._run, self._log, self._say, self._told = run, log, say, set[type]()
        self._folder = run.folder.path / "pictures"
        encoders = run.objective.encoders(run.engine.module)
        self._every = run.config.logging.pictures_every_steps if encoders else 0

    def due(self, step: int, *, last: bool = False) -> bool:
        """last: the run ends here."""
        return self._every > 0 and (last or step % self._every == 0)

    def draw(self, step: int) -> None:
        """What the best of the objective's encoders makes of the images. All ranks call it; each computes a share."""
        run, images, started = self._run, self._run.evaluation.test, time.perf_counter()
        name, encoder = next(iter(run.objective.encoders(run.engine.module).items()))
        wanted = [permuted_index(0, CHOICE, len(images), place) for place in range(min(PICTURED, len(images)))]
        try:
            found = extract(
                {name: encoder},
                images,
                wanted,
                image_size=run.config.data.image_size,
                batch_size=run.dataset.micro_batch_size,
                ranks=run.ranks,
                patches=True,
            )
        except BadImageError as error:  # on every rank
            self._tell(step, error)
            return
        if not run.ranks.first:
            return
        try:
            path = self._draw(step, name, found.features[f"{name}.patches"], found.indices)
        except Exception as error:  # whatever it is, it is not worth a run
            self._tell(step, error)
            return
        seconds = time.perf_counter() - started
        self._log({"kind": "pictures", "step": step, "pictures": {TITLE: path.name}, "seconds": seconds})

    def _draw(self, step: int, name: str, features_BND: np.ndarray, indices: np.ndarray) -> Path:
        run, images = self._run, self._run.evaluation.test
        if len(indices) < 2:
            raise ValueError(f"{images.name} has {len(indices)} images that can be read, and pictures need 2 or more")
        if not np.isfinite(features_BND).all():
            raise ValueError("the features are not finite")
        self._folder.mkdir(parents=True, exist_ok=True)
        shown, size = indices[:SHOWN].tolist(), run.config.data.image_size
        pixels = np.stack([center_crop(images.read(index), size) for index in shown])
        features = features_BND[:SHOWN] - features_BND.mean(axis=0, dtype=np.float64)
        marked, grid = busiest_patches(pixels, run.objective.grid), run.objective.grid
        scores, said = self._turned(step, pca_scores(features), [images.sample_id(index) for index in shown])
        path = self._folder / f"{NAME.format(step)}.png"
        heading = f"{name} encoder, step {step:,}"
        near = similarity(features, marked)
        draw_step(path, pixels, colours(scores), near, grid, heading=heading, marked=marked)
        known = "never trained on" if run.evaluation.held_out else "of the split that is trained on"
        describe(
            path,
            title=TITLE,
            caption=f"{len(shown)} images of {images.name}, {known}. Features of the {name} encoder's last block, less "
            f"the mean at each place over {len(features_BND):,} images. Colours: the first three principal components "
            f"of these images' patches, each of the same spread. {said} Similarity: cosine with the marked patch, of "
            "features less the mean of those shown.",
            alt="Images with a marked patch; below each its patches in the colours of their features, and a heat map "
            "of their similarity to the marked one.",
            section="features",
            step=step,
        )
        return path

    def _turned(self, step: int, scores: np.ndarray, names: list[str]) -> tuple[np.ndarray, str]:
        """Scores as near as they can be to those of the picture before, if it is of the same images; and in words.

        They are kept for the picture that comes next, in this process or in one that resumes the run.
        """
        said = "Those of later steps are turned to these."
        earlier = [path for path in sorted(self._folder.glob(f"{OURS}.npz")) if step_of(path) < step]
        if earlier:
            with np.load(earlier[-1], allow_pickle=False) as before:
                if before["images"].tolist() == names and before["scores"].shape == scores.shape:
                    scores, near = turned(scores, before["scores"])
                    said = f"They are turned, all as one, to be like those of step {step_of(earlier[-1]):,}: the "
                    said += f"correlation with these is {near:.2f}."
        with written_whole(self._folder / f"{NAME.format(step)}.npz") as file:
            np.savez(file, scores=scores, images=np.array(names))
        return scores, said

    def _tell(self, step: int, error: Exception) -> None:
        """Once for each kind of error: a disk that is full stays so."""
        if type(error) not in self._told:
            self._say(
                f"warning: there is no picture of step {step}: {type(error).__name__}: {error}. Training goes on. It "
                "is tried again at later steps, without another word; logging.pictures_every_steps=0 turns it off"
            )
        self._told.add(type(error))


def step_of(path: Path) -> int:
    return int(path.stem[-8:])
