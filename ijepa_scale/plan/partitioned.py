"""ZeRO-3's gathers of weights, as DeepSpeed's coordinator decides on them (0.19.8), without running.

A module's weights are gathered when it is called, with what lies ahead up to a prefetch bucket. They are given up after
the call unless they come again within the reuse distance, or a prefetch has passed over them. Small weights that are
trained stay, and are gathered once a step. A test counts all this at the collectives.
"""

import functools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from ijepa_scale.models.blocks import Block
from ijepa_scale.plan.memory import Sharding

Call = tuple[str, nn.Module]  # "fetch" before a module, or "release" after it


@dataclass(frozen=True, kw_only=True)
class Gathers:
    """What each all-gather brings: of a step's first micro-step, and of each later one, which finds some there.

    A weight is its elements, and whether it is trained. most: elements that are there at once beside small ones.
    """

    first: list[list[tuple[int, bool]]]
    later: list[list[tuple[int, bool]]]
    most: int


def kept_whole(parameter: nn.Parameter, persistence: int) -> bool:
    """Whether it is small, and trained: then every rank has all of it between steps, too."""
    return parameter.requires_grad and parameter.numel() <= persistence


def gathers(module: nn.Module, sharding: Sharding) -> Gathers:
    """What is gathered, as often as it is.

    module: its children are the networks, in the order in which they run, but for those without gradients: these run
    second, as a target encoder. Activations that are computed again change nothing.
    """
    return _gathers(module, sharding.persistence, sharding.prefetch, sharding.reuse)


@functools.lru_cache(maxsize=1)  # all settings of a plan ask for the same
def _gathers(module: nn.Module, persistence: int, prefetch: int, reuse: int) -> Gathers:
    trace = list(_forward(module)) + list(_backward(module))
    coordinator = _Coordinator(trace, persistence, prefetch, reuse)
    first, later = (
        [[(parameter.numel(), parameter.requires_grad) for parameter in call] for call in coordinator.run()]
        for _ in range(2)
    )
    return Gathers(first=first, later=later, most=coordinator.most)


def _networks(module: nn.Module) -> list[nn.Module]:
    first, *others = module.children()
    return [first, *sorted(others, key=_is_trained)]


def _is_trained(network: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """What a module calls, in order. Lists are not called themselves."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield child


def _forward(module: nn.Module, parts: Iterable[nn.Module] | None = None) -> Iterator[Call]:
    yield "fetch", module
    if not isinstance(module, Block):
        for part in _networks(module) if parts is None else parts:
            yield from _forward(part, _parts(part))
    yield "release", module


def _backward(module: nn.Module, parts: list[nn.Module] | None = None) -> Iterator[Call]:
    yield "fetch", module
    if not isinstance(module, Block):
        for part in reversed([one for one in _networks(module) if _is_trained(one)] if parts is None else parts):
            yield from _backward(part, list(_parts(part)))
    yield "release", module


@functools.lru_cache(maxsize=1000)
def _used(module: nn.Module, recurse: bool) -> list[nn.Parameter]:
    return list(module.parameters(recurse=recurse))


@functools.lru_cache(maxsize=1000)
def _elements(module: nn.Module, recurse: bool) -> int:
    return sum(parameter.numel() for parameter in _used(module, recurse))


@dataclass
class _Coordinator:
    trace: list[Call]
    persistence: int
    prefetch: int
    reuse: int
    there: set[nn.Parameter] = field(default_factory=set)
    decided: dict[tuple[nn.Module, int], set[nn.Parameter]] = field(default_factory=dict)
    most: int = 0

    def run(self) -> list[list[nn.Parameter]]:
        """The all-gathers of a micro-step, what each brings; what it leaves there the next one finds."""
        order = [module for what, module in self.trace if what == "fetch"]
        own = [_used(module, isinstance(module, Block)) for module in order]
        queue = deque((parameter, step) for step, used in enumerate(own) for parameter in used)
        fetched_for: dict[nn.Parameter, int] = {}
        calls: list[list[nn.Parameter]] = []
        step = 0
        for what, module in self.trace:
            if what == "release":
                self.there -= self._given_up(module, order[step:], step, fetched_for)
                continue
            calls += self._gather(own[step])
            for _ in {parameter for parameter in own[step] if fetched_for.get(parameter, -1) < step}:
                parameter, at = queue.popleft()
                fetched_for[parameter] = at
            ahead: dict[nn.Parameter, None] = {}
            held = 0
            while queue and held < self.prefetch:
                parameter, at = queue.popleft()
                if not self._is_there(parameter) and parameter not in ahead:
                    ahead[parameter] = None
                    held += parameter.numel()
                fetched_for[parameter] = max(fetched_for.get(parameter, -1), at)
            calls += self._gather(ahead)
            self.most = max(self.most, sum(parameter.numel() for parameter in self.there))
            step += 1
        return calls

    def _is_there(self, parameter: nn.Parameter) -> bool:
        return parameter in self.there or kept_whole(parameter, self.persistence)

    def _gather(self, parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
        new = [parameter for parameter in parameters if not self._is_there(parameter)]
        self.there.update(new)
        return [new] if new else []

    def _given_up(
        self, module: nn.Module, following: list[nn.Module], step: int, fetched_for: dict[nn.Parameter, int]
    ) -> set[nn.Parameter]:
        """Decided once for a place in the trace, as DeepSpeed does: in a micro-step that finds nothing there."""
        if (module, step) in self.decided:
            return self.decided[module, step]
        whole = isinstance(module, Block)
        given_up = {parameter for parameter in _used(module, whole) if fetched_for.get(parameter, -1) <= step}
        passed = 0
        for other in following:
            if passed >= self.reuse or not given_up:
                break
            given_up.difference_update(_used(other, whole))
            passed += _elements(other, whole)
        self.decided[module, step] = given_up
        return given_up
