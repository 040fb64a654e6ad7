"""Images a second and core from stored images to crops: ours, torchvision's PIL pipeline, and bare decoding.

All is timed in one process on one thread, in turns, in CPU time, which hardly changes when other processes use the
cores. The fastest bare decoder is the limit of any pipeline that decodes whole images.
"""

import io
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from ijepa_scale.benchmark.timing import machine, spread
from ijepa_scale.data.collate import MicroBatches, micro_batch_stream
from ijepa_scale.data.decoding import BadImageError, decode
from ijepa_scale.data.images import ImageSet, open_images
from ijepa_scale.data.transforms import RandomCrop
from ijepa_scale.masking.grid import PatchGrid
from ijepa_scale.masking.multiblock import MultiBlock
from ijepa_scale.objectives.masks import BlockMasks

SAMPLE = 500  # images at most, evenly spaced over the source
TURN = 50  # images each pipeline takes before the next has its turn
BATCH = 32  # of the whole loader
SCALE = (0.3, 1.0)
DECODE = "decode: "

Say = Callable[[str], None]


@dataclass
class Pipeline:
    """run: what is done with an image, given its place in the sample and its file. rates: images/s, by round."""

    name: str
    run: Callable[[int, bytes], Any]
    rates: list[float] = field(default_factory=list)


def benchmark_data(
    source: str,
    *,
    size: int,
    rounds: int,
    workers: int,
    split: str,
    say: Say,
    column: str = "",
    config: str = "",
) -> dict[str, Any]:
    """Time `rounds` rounds over a sample of a source; the results, ready for JSON. ValueError for a wrong source.

    column, config: as of `open_images`.
    """
    images = open_images(source, split=split, column=column, config=config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        decoders = installed_decoders()
        files, left_out = sampled_files(images, decoders)
        pipelines = [Pipeline("ours", _ours(size)), *_torchvision(size), *decoders]
        _turns(pipelines, files, rounds, say)
        loader = loaded_per_second(images, size=size, count=4 * SAMPLE, workers=workers) if workers else None
    finally:
        torch.set_num_threads(threads)
    return _results(images, files, left_out, pipelines, size=size, workers=workers, loader=loader)


def installed_decoders() -> list[Pipeline]:
    """Bare decoders to RGB, of the bindings that can be imported."""
    found = [Pipeline(DECODE + "Pillow", lambda i, file: decode(file))]
    try:
        import simplejpeg

        found.append(Pipeline(DECODE + "simplejpeg", lambda i, file: simplejpeg.decode_jpeg(file)))
    except ImportError:
        pass
    try:
        from torchvision.io import ImageReadMode, decode_image

        # Nothing writes to them.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)

        def by_torchvision(i: int, file: bytes) -> Any:
            return decode_image(torch.from_numpy(np.frombuffer(file, np.uint8)), ImageReadMode.RGB)

        found.append(Pipeline(DECODE + "torchvision", by_torchvision))
    except ImportError:
        pass
    try:
        import cv2

        cv2.setNumThreads(1)
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        found.append(Pipeline(DECODE + "OpenCV", lambda i, file: cv2.imdecode(np.frombuffer(file, np.uint8), flags)))
    except ImportError:
        pass
    return found


def sampled_files(images: ImageSet, decoders: list[Pipeline]) -> tuple[list[bytes], int]:
    """Files that every decoder reads, after taking from the list those that read less than half; and how many not."""
    indices = np.unique(np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).round().astype(int)).tolist()
    read_by: list[tuple[bytes, set[str]]] = []  # two images may have the same file
    for index in indices:
        try:
            file = images.content(index)
        except BadImageError:
            continue
        read_by.append((file, {decoder.name for decoder in decoders if _reads(decoder, file)}))
    for decoder in list(decoders):
        if 2 * sum(decoder.name in names for _, names in read_by) < len(indices):
            decoders.remove(decoder)
    files = [file for file, names in read_by if all(decoder.name in names for decoder in decoders)]
    if not decoders or not files:
        raise ValueError(f"{images.name}: of {len(indices)} images sampled none can be read; check the source")
    return files, len(indices) - len(files)


def _reads(decoder: Pipeline, file: bytes) -> bool:
    try:
        return decoder.run(0, file) is not None
    except Exception:  # decoders raise whatever the bytes lead them to
        return False


def _ours(size: int) -> Callable[[int, bytes], Any]:
    return lambda i, file: RandomCrop(size, (0, i), scale=SCALE).of(file)


def _torchvision(size: int) -> list[Pipeline]:
    try:
        from torchvision.transforms import Compose, InterpolationMode, PILToTensor, RandomResizedCrop
    except ImportError:
        return []
    transform = Compose([RandomResizedCrop(size, SCALE, interpolation=InterpolationMode.BICUBIC), PILToTensor()])
    return [
        Pipeline("torchvision on Pillow", lambda i, file: transform(Image.open(io.BytesIO(file)).convert("RGB"))),
    ]


def _turns(pipelines: list[Pipeline], files: list[bytes], rounds: int, say: Say) -> None:
    starts = range(0, len(files), TURN)
    for number in range(rounds + 1):  # the first warms up
        seconds = dict.fromkeys((pipeline.name for pipeline in pipelines), 0.0)
        for turn, start in enumerate(starts):
            for pipeline in pipelines if (turn + number) % 2 else reversed(pipelines):
                before = time.process_time()
                for i in range(start, min(start + TURN, len(files))):
                    pipeline.run(i, files[i])
                seconds[pipeline.name] += time.process_time() - before
        if number:
            for pipeline in pipelines:
                pipeline.rates.append(len(files) / seconds[pipeline.name])
        say(f"round {number} of {rounds}" if number else "warmed up")


def loaded_per_second(images: ImageSet, *, size: int, count: int, workers: int) -> float:
    """Whole micro-batches, masks and the source's own reading included, by worker processes: images/s, elapsed."""
    batch = min(BATCH, len(images))
    dataset = MicroBatches(
        images=images,
        draw_masks=BlockMasks(MultiBlock(grid=PatchGrid(14, 14))),
        seed=0,
        image_size=size,
        crop_scale=SCALE,
        global_batch_size=batch,
        micro_batch_size=batch,
    )
    steps = max(4 * workers, count // batch)
    times = [time.perf_counter() for _ in micro_batch_stream(dataset, start_step=0, stop_step=steps, workers=workers)]
    return batch * (steps - 1 - workers) / (times[-1] - times[workers])  # once every process has made one


def _results(
    images: ImageSet,
    files: list[bytes],
    left_out: int,
    pipelines: list[Pipeline],
    *,
    size: int,
    workers: int,
    loader: float | None,
) -> dict[str, Any]:
    decoding = [pipeline for pipeline in pipelines if pipeline.name.startswith(DECODE)]
    limit = max(decoding, key=lambda pipeline: float(np.median(pipeline.rates)))
    shapes = [decode(file).size for file in files]
    return {
        "machine": machine(torch.device("cpu")),
        "source": images.name,
        "images": len(files),
        "left_out": left_out,
        "mean_bytes": float(np.mean([len(file) for file in files])),
        "median_width_height": np.median(shapes, axis=0).tolist(),
        "size": size,
        "rounds": len(limit.rates),
        "limit": limit.name,
        "pipelines": [
            {
                "name": pipeline.name,
                "images_per_second": spread(pipeline.rates),
                "of_limit": spread([a / b for a, b in zip(pipeline.rates, limit.rates, strict=True)]),
            }
            for pipeline in pipelines
        ],
        "loader": {"workers": workers, "images_per_second": loader} if loader else None,
    }
