"""GPUs and the links between them: peaks, memory, bandwidths, with their sources; what is assumed is said to be.

Bytes and FLOPs a second, each way. A node is as many GPUs as its fast links join.
"""

import math
from dataclasses import dataclass

from ijepa_scale.engine.device import peak_flops
from ijepa_scale.plan.step_model import Rates

SUSTAINED, COPIED = 0.7, 0.83  # shares of peak and bandwidth assumed of a GPU that nobody has measured here
USABLE = 0.95  # of the memory that the data sheet names: CUDA's context, NCCL and fragmentation take of the rest


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU. torch_name: as device.PEAKS knows it. memory: bytes, bandwidth: B/s, both of its data sheet.

    link: B/s to the other GPUs of its node, of the data sheet (NVLink's or PCIe's figure for both ways, halved).
    network: a key of NETWORKS, what the vendor's own node has; "": there is none, and it must be said.
    rates: what it sustains where that is known better than by SUSTAINED and COPIED. slower: a step's time over what
    step_model.py says.
    """

    torch_name: str
    memory: float
    bandwidth: float
    link: float
    network: str = ""
    rates: Rates | None = None
    slower: float = 1.0
    source: str = "assumed, not measured"

    @property
    def peak(self) -> float:
        """FLOP/s in bf16, dense."""
        peak = peak_flops(self.torch_name, "bf16")
        assert peak, self.torch_name
        return peak

    @property
    def sustained(self) -> Rates:
        return self.rates or Rates(matrix=SUSTAINED * self.peak, copy=COPIED * self.bandwidth)


# What one H100 did (docs/measurements/nvidia-h100-80gb-hbm3): device.json, and in alone.json 242.4 ms for the step that
# takes 270.8 by arithmetic.
H100_RATES, H100_SLOWER = Rates(matrix=690e12, copy=2.993e12), 242.4 / 270.8
H100_SOURCE = "measured on one H100 80GB: docs/measurements/nvidia-h100-80gb-hbm3"
A100_RATES = Rates(matrix=260e12, copy=1.65e12)  # as of the 80 GB card

# Data sheets and, of what has none, architecture white papers; HGX's for B200, an eighth of a board.
GPUS = {
    "a100-40g": Gpu(
        torch_name="A100-SXM4-40GB", memory=40e9, bandwidth=1.555e12, link=300e9, network="ib-8x200",
        rates=Rates(matrix=260e12, copy=1.26e12),
    ),
    "a100-80g": Gpu(
        torch_name="A100-SXM4-80GB", memory=80e9, bandwidth=2.039e12, link=300e9, network="ib-8x200", rates=A100_RATES
    ),
    "a100-pcie-80g": Gpu(torch_name="A100 80GB PCIe", memory=80e9, bandwidth=1.935e12, link=32e9),
    "h100": Gpu(
        torch_name="H100 80GB HBM3", memory=80e9, bandwidth=3.35e12, link=450e9, network="ib-8x400",
        rates=H100_RATES, slower=H100_SLOWER, source=H100_SOURCE,
    ),
    "h100-pcie": Gpu(torch_name="H100 PCIe", memory=80e9, bandwidth=2.0e12, link=64e9),
    "h200": Gpu(
        torch_name="H200", memory=141e9, bandwidth=4.8e12, link=450e9, network="ib-8x400",
        rates=Rates(matrix=690e12, copy=COPIED * 4.8e12), slower=H100_SLOWER,
        source="assumed as the one H100 that was measured, but for its memory",
    ),
    "b200": Gpu(torch_name="B200", memory=180e9, bandwidth=8.0e12, link=900e9, network="ib-8x400"),
    "l40s": Gpu(torch_name="L40S", memory=48e9, bandwidth=0.864e12, link=32e9),
    "a10": Gpu(torch_name="A10", memory=24e9, bandwidth=0.6e12, link=32e9),
    "l4": Gpu(torch_name="L4", memory=24e9, bandwidth=0.3e12, link=16e9),
    "rtx4090": Gpu(torch_name="GeForce RTX 4090", memory=24e9, bandwidth=1.008e12, link=32e9),
    "rtx3090": Gpu(torch_name="GeForce RTX 3090", memory=24e9, bandwidth=0.936e12, link=32e9),
}  # fmt: skip

# B/s from a node to others: all of its adapters together.
NETWORKS = {
    "ib-8x200": 8 * 25e9,  # DGX A100: eight HDR adapters of 200 Gbit/s
    "ib-8x400": 8 * 50e9,  # DGX H100: eight NDR adapters of 400 Gbit/s; AWS p5 has as much
    "ib-1x200": 25e9,
    "ib-1x400": 50e9,
    "efa-400": 50e9,  # AWS p4d, p4de: four adapters of 100 Gbit/s
    "ethernet-100": 12.5e9,
    "ethernet-25": 3.125e9,
    "ethernet-10": 1.25e9,
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """gpus: in all. node: GPUs of one. network: B/s from a node to others, infinite where there is one."""

    gpu: str
    gpus: int
    node: int
    network: float

    @property
    def kind(self) -> Gpu:
        return GPUS[self.gpu]

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.node)

    @property
    def link(self) -> float:
        """B/s of data that a GPU can take in of a collective over all of them.

        Rings enter and leave a node through all of its adapters, and each carries its part of the data: so it is the
        node's own rate to others, or that between its GPUs where this is less.
        """
        return min(self.kind.link, self.network) if self.nodes > 1 else self.kind.link


def cluster_of(gpu: str, gpus: int, *, node: int, network: str) -> Cluster:
    """ValueError for what is not known, and for GPUs that do not fill their nodes. network: a name, or GB/s a node."""
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu} is not known; use one of {', '.join(GPUS)}")
    if gpus < 1 or node < 1:
        raise ValueError(f"--gpus and --gpus-per-node must be 1 or more, got {gpus} and {node}")
    if gpus > node and gpus % node:
        raise ValueError(
            f"--gpus {gpus} are no whole nodes of {node}; use {gpus // node * node} or {-(-gpus // node) * node}, or "
            "another --gpus-per-node"
        )
    if gpus <= node:
        return Cluster(gpu=gpu, gpus=gpus, node=node, network=math.inf)
    return Cluster(gpu=gpu, gpus=gpus, node=node, network=_network(gpu, network or GPUS[gpu].network))


def _network(gpu: str, network: str) -> float:
    if network in NETWORKS:
        return NETWORKS[network]
    known = f"one of {', '.join(NETWORKS)}, or the GB/s of a node to others, as 25"
    if not network:
        raise ValueError(f"how nodes of {gpu} are joined is not known: give --interconnect, {known}")
    try:
        rate = float(network)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError(f"--interconnect {network} is not known; use {known}")
    return 1e9 * rate
