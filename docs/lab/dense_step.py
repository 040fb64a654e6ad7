"""The training step of docs/lab/learning.py, so that on a GPU all of it is one CUDA graph.

The project's packed step launches a thousand small kernels from the host. Here the host launches one graph. Several
runs share a GPU, each on a stream of its own, in threads of one process.
"""

import math
import threading
from typing import Any

import torch
import torch.nn.functional as F
from dense_loss import Loss, Recipe, build, draw_masks

from ijepa_kernels.patchify import IMAGENET_MEAN, IMAGENET_STD
from ijepa_scale.engine import muon
from ijepa_scale.engine.schedules import Schedules

LAYOUTS = 8192  # of masks, drawn once and used in a random order
EAGER_STEPS = 3
LONG = 400_000  # images, from which on a run goes first on its GPU, lest it be the last of all to end
CAPTURING = threading.Lock()  # while a graph is recorded nobody may wait for the whole device


class Run:
    """A run on images (n, 3, H, W) uint8 that lie on its device. Its random numbers are its own."""

    def __init__(self, recipe: Recipe, images: torch.Tensor):
        self.recipe, self.images, device = recipe, images, images.device
        self.module, spec = build(recipe)
        self.module.to(device)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self.loss = Loss(recipe, self.module, spec.grid, device, self.generator)
        layouts = min(recipe.steps, max(16, LAYOUTS // (recipe.batch * recipe.mask_sets)))
        self.masks = draw_masks(spec, layouts, recipe.batch * recipe.mask_sets, recipe.seed + 77).to(device)
        self._schedule(layouts, device)
        self._flatten(device)
        self.mean, self.std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        self.done, self.graph = 0, None
        self.stream = torch.cuda.Stream(priority=-(recipe.images > LONG)) if images.is_cuda else None
        self.last_loss = torch.zeros((), device=device)

    def _schedule(self, layouts: int, device: torch.device) -> None:
        """All that changes from step to step, as tensors of which a step takes its own row by a counter."""
        r = self.recipe
        g = torch.Generator().manual_seed(1000 + r.seed)
        whole = len(self.images) // r.batch * r.batch
        epochs = [torch.randperm(len(self.images), generator=g)[:whole] for _ in range(-(-r.steps * r.batch // whole))]
        self.order = torch.cat(epochs)[: r.steps * r.batch].view(r.steps, r.batch).to(device)
        self.layout = torch.randint(layouts, (r.steps,), generator=g).to(device)
        schedules = Schedules(
            total=r.steps,
            warmup=int(r.warmup * r.steps),
            start_lr=r.start_lr,
            lr=r.lr,
            final_lr=r.final_lr,
            weight_decay=r.weight_decay,
            ema=r.ema,
        )
        rows = []
        for step in range(r.steps):
            now, ramp = schedules.at(step), min(1.0, max(0.0, (step / r.steps - 0.15) / 0.15))
            corrections = (1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1))
            lr = now["lr"] * min(1.0, (r.steps - step) / (r.cooldown * r.steps)) if r.cooldown else now["lr"]
            rows.append([lr, now["weight_decay"], 1 - now["ema_momentum"], *corrections, ramp])
        self.rows, self.counter = torch.tensor(rows, device=device), torch.zeros(1, dtype=torch.long, device=device)

    def _flatten(self, device: torch.device) -> None:
        """All trained weights in one tensor, Muon's side by side by their shape; the target encoder's in another."""
        twins = {id(own): target for own, target in self.module.twins()}
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        ours = {True: [], False: []}  # whether there is an average of it
        for name, p in named:
            if not name.startswith("target_encoder."):
                ours[id(p) in twins].append((name, p, bool(self.recipe.muon_lr) and p.ndim == 2 and "blocks." in name))
        ordered = [
            one
            for averaged in (True, False)
            for one in sorted(ours[averaged], key=lambda one: (not one[2], tuple(one[1].shape) if one[2] else ()))
        ]
        self.parameters = [p for _, p, _ in ordered]
        self.flat = torch.cat([p.detach().flatten() for p in self.parameters])
        self.average = torch.cat([twins[id(p)].detach().flatten() for p in self.parameters if id(p) in twins])
        self.matrices: list[tuple[slice, tuple[int, ...]]] = []
        offset = 0
        for _, p, by_muon in ordered:
            if by_muon:
                self._add_matrix(offset, p.shape)
            if id(p) in twins:
                twins[id(p)].data = self.average[offset : offset + p.numel()].view(p.shape)
            p.data = self.flat[offset : offset + p.numel()].view(p.shape)
            offset += p.numel()

        def of_each(value: Any) -> torch.Tensor:
            return torch.cat([torch.full((p.numel(),), float(value(p, m)), device=device) for _, p, m in ordered])

        self.decayed = of_each(lambda p, m: p.ndim > 1)
        self.rate = of_each(lambda p, m: self.recipe.muon_lr / self.recipe.lr if m else 1)
        self.fresh = of_each(lambda p, m: 1 - muon.MOMENTUM if m else 0.1)
        self.first, self.second = torch.zeros_like(self.flat), torch.zeros_like(self.flat)

    def _add_matrix(self, offset: int, shape: torch.Size) -> None:
        if self.matrices:
            where, (count, *same) = self.matrices[-1]
            if where.stop == offset and tuple(same) == tuple(shape):
                self.matrices[-1] = (slice(where.start, offset + shape.numel()), (count + 1, *same))
                return
        self.matrices.append((slice(offset, offset + shape.numel()), (1, *shape)))

    def crops(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Random resized crops of images (B, 3, H, W) uint8: bicubic, normalized."""
        r, count = self.recipe, len(images)
        u = torch.rand(5, count, device=images.device, generator=generator)
        area = r.crop_scale[0] + (r.crop_scale[1] - r.crop_scale[0]) * u[0]
        ratio = torch.exp(math.log(3 / 4) + math.log(16 / 9) * u[1])
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        x, y = (u[2] * 2 - 1) * (1 - width), (u[3] * 2 - 1) * (1 - height)
        turned = 1 - 2 * (u[4] < 0.5).float() if r.flip else torch.ones_like(width)
        zero = torch.zeros_like(width)
        theta = torch.stack([width * turned, zero, x, zero, height, y], 1).view(count, 2, 3)
        grid = F.affine_grid(theta, [count, 3, r.image_size, r.image_size], align_corners=False)
        sampled = F.grid_sample(images.float(), grid, mode="bicubic", padding_mode="reflection", align_corners=False)
        return (sampled.clamp(0, 255).round() - self.mean) / self.std

    def _step(self) -> None:
        lr, weight_decay, fresh, first_bias, second_bias, ramp = self.rows.index_select(0, self.counter)[0].unbind()
        images = self.images.index_select(0, self.order.index_select(0, self.counter)[0])
        images = self.crops(images, self.generator)
        loss = self.loss(images, self.masks.take(self.layout.index_select(0, self.counter)), ramp)
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, self.parameters)])
        with torch.no_grad():
            self.first.lerp_(gradient, self.fresh)
            self.second.lerp_(gradient.square(), 1e-3)
            update = (self.first / first_bias) / ((self.second / second_bias).sqrt() + 1e-8)
            for where, shape in self.matrices:
                direction = torch.lerp(gradient[where], self.first[where], muon.MOMENTUM).view(shape)
                size = muon.SIZE * math.sqrt(max(shape[1:]))
                update[where] = muon.orthogonal(direction).flatten() * size
            rate = self.rate * lr
            self.flat.mul_(1 - rate * weight_decay * self.decayed).sub_(rate * update)
            self.average.lerp_(self.flat[: len(self.average)], fresh)
            self.counter += 1
            self.last_loss.copy_(loss.detach())

    def train(self, until: int) -> None:
        """Take steps until so many are done. On a GPU the fourth and later ones are replays of one graph."""
        if not self.images.is_cuda:
            for _ in range(until - self.done):
                self._step()
            self.done = max(self.done, until)
            return
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if self.graph is None:
                with CAPTURING:
                    self._record(until)
            while self.graph is not None and self.done < until:
                self.graph.replay()
                self.done += 1
        self.stream.synchronize()

    def _record(self, until: int) -> None:
        while self.done < min(until, EAGER_STEPS):  # what these allocate and plan the graph then finds
            self._step()
            self.done += 1
        if self.done < until:
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self._step()  # recorded, not run
            self.graph = graph
