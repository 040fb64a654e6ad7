"""Times the kernels beside their definitions and peers: pytest kernels/benchmarks --benchmark-only.

On a GPU by its own events, with a cold second-level cache, as triton.testing.do_bench does. The rows go to
docs/measurements/DEVICE/kernels.json. On a CPU only the definitions and peers run, on small batches: such numbers say
nothing about GPUs, and are not kept. --case takes one case, --keep says where the rows go.
"""

from pathlib import Path

import pytest
import torch

from benchmarks.cases import COMPILED, DEVICE, ON_GPU
from benchmarks.tables import keep
from ijepa_scale.benchmark.timing import measurements, moment

FLUSHED = 1 << 32  # bytes written between rounds: more than any cache holds, and long enough to hide launches behind
ROUNDS, WARMUP_ROUNDS = (30, 5) if ON_GPU else (3, 1)

_rows: list[dict] = []
_copy_rates: dict[int, float] = {}  # bytes read and written -> bytes a second
torch._dynamo.config.recompile_limit = 64  # a shape is a compilation; past the limit it would time eager operations
torch._dynamo.config.fail_on_recompile_limit_hit = True


def clock():
    return moment(DEVICE)


def pytest_addoption(parser):
    parser.addoption("--case", metavar="CONFIG-IMAGES", help="this case alone, such as vith14-128")
    parser.addoption("--keep", type=Path, metavar="FILE", help="of the rows (default docs/measurements/DEVICE/)")


def pytest_collection_modifyitems(config, items):
    not_compiled = pytest.mark.skip(reason=f"torch.compile is timed on a GPU, at {COMPILED}")
    others = [item for item in items if config.option.case not in (None, "{}-{}".format(*case_in(item)))]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))
        parameters, case = item.callspec.params, case_in(item)
        if parameters.get("provider") == "compiled" and not (ON_GPU and case in COMPILED):
            item.add_marker(not_compiled)


def case_in(item):
    parameters = item.callspec.params
    return parameters.get("case") or (parameters["name"], 128)


@pytest.fixture(scope="session")
def flush():
    cache = torch.empty(FLUSHED if ON_GPU else 0, dtype=torch.uint8, device=DEVICE)

    def write() -> None:
        if ON_GPU:
            cache.zero_()

    return write


@pytest.fixture
def row(benchmark, flush, copy_rate, pytestconfig):
    """row(run, op=..., shape=..., provider=..., bytes_moved=...): times run() and keeps the row."""

    def timed(run, *, op: str, shape: str, provider: str, bytes_moved: int) -> None:
        if not ON_GPU and provider == "ours":
            pytest.skip("on a CPU the definitions run")
        run()  # compiles
        memory = 0
        if ON_GPU:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            memory = torch.cuda.max_memory_allocated() - before
        benchmark.pedantic(run, setup=flush, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
        stats = benchmark.stats.stats
        rate = bytes_moved / stats.median
        share = rate / copy_rate(bytes_moved)
        _rows.append(
            {
                "op": op,
                "shape": shape,
                "provider": provider,
                "milliseconds": {"median": 1e3 * stats.median, "low": 1e3 * stats.q1, "high": 1e3 * stats.q3},
                "bytes": bytes_moved,
                "gigabytes_per_second": rate / 1e9,
                "share_of_copy": share,
                "extra_memory_bytes": memory,
            }
        )
        benchmark.extra_info.update(_rows[-1])
        if path := kept(pytestconfig):
            keep_rows(path)  # each as it is timed: the job may be cut

    return timed


def kept(config) -> Path | None:
    """Where rows go: of a part of the benchmarks and of a CPU only where that is said."""
    if config.option.keep or not ON_GPU or config.option.keyword or config.option.case:
        return config.option.keep
    return measurements({"gpu": torch.cuda.get_device_name()}) / "kernels.json"


def keep_rows(path: Path) -> None:
    import triton

    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    facts = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    keep({**facts, "copy_gigabytes_per_second": max(_copy_rates.values()) / 1e9, "rows": _rows}, path)


@pytest.fixture(scope="session")
def copy_rate(flush):
    """copy_rate(size): bytes a second that a copy reads and writes, in this run, where they are so many in all."""

    def measured(size: int) -> float:
        if size not in _copy_rates:
            source = torch.zeros(size // 2, dtype=torch.uint8, device=DEVICE)
            target = torch.empty_like(source)
            seconds = []
            for _ in range(WARMUP_ROUNDS + ROUNDS):
                flush()
                start = clock()
                target.copy_(source)
                seconds.append(clock() - start)
            _copy_rates[size] = size / sorted(seconds[WARMUP_ROUNDS:])[ROUNDS // 2]
        return _copy_rates[size]

    return measured


def pytest_terminal_summary(terminalreporter, config):
    if not _rows:
        return
    from rich.console import Console
    from rich.table import Table

    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    title = f"{device}: a copy reads and writes {max(_copy_rates.values()) / 1e9:,.0f} GB/s"
    table = Table("op", "shape", "provider", "ms", "GB/s", "of a copy", "extra MiB", title=title)
    for one in _rows:
        table.add_row(
            *(one["op"], one["shape"], one["provider"], f"{one['milliseconds']['median']:.3f}"),
            f"{one['gigabytes_per_second']:,.0f}",
            f"{100 * one['share_of_copy']:.0f}%",
            f"{one['extra_memory_bytes'] / 2**20:,.0f}",
        )
    Console(width=120).print(table)
    if not ON_GPU:
        print("Definitions and peers on a CPU, small batches: these numbers say nothing about GPUs.")
    path = kept(config)
    print(f"written: {path}" if path else "not kept: a part of the benchmarks, or of a CPU; --keep FILE keeps it")
