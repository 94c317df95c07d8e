"""What a GPU and its cluster can do: the vendor's peaks, and what training sustains of them.

Peaks are from the vendor's data sheets (H100 SXM, H200; dense). Sustained rates are named with
their source. Nothing here was measured by this project on a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as printed.
        memory: bytes that programs can use.
        peak: dense operations a second by precision (the divisor of MFU).
        gemm: operations a second that large matrix products sustain in training.
        bandwidth: bytes a second of memory that elementwise kernels sustain.
    """

    name: str
    memory: float
    peak: dict[str, float]
    gemm: dict[str, float]
    bandwidth: float


# bf16: 790e12 was measured on an idle H200 for one large product; 690e12 allows for power limits
# and the shapes of a training step. fp8: the rate at which this model of a step reproduces
# NVIDIA's published 16,934 tokens/s/GPU for Llama 2 7B (NeMo 24.12, 8 H100). Other published
# numbers are then predictions; see docs/planning.md.
_GEMM = {"bf16": 690e12, "fp8": 950e12}
_PEAK = {"bf16": 989.4e12, "fp8": 1978.9e12}

GPUS = {
    # 81,559 MiB as the driver reports it; 90 % of 3.35 TB/s.
    "h100": Gpu("H100", 79.6 * 2**30, _PEAK, _GEMM, 3.0e12),
    # About 139 GiB and 4.3 TB/s for copies, as measured.
    "h200": Gpu("H200", 139.0 * 2**30, _PEAK, _GEMM, 4.3e12),
}

# Devices whose peak is known but which the planner does not plan for.
_OTHER_PEAKS = {"A100": {"bf16": 312e12}, "H20": {"bf16": 148e12, "fp8": 296e12}}

# Flash-attention 3 on an H100 at 16k rows, operations a second forward and backward (backward
# counts five products for the forward's two), by head size. Source: its paper's figures.
ATTENTION = {64: (400e12, 330e12), 128: (620e12, 540e12), 256: (600e12, 314e12)}
# Rows at which half of that rate is reached: 4k rows give about nine tenths of 16k's.
ATTENTION_HALF_ROWS = 400.0

NVLINK = 350e9  # bytes a second of a collective within a node (450e9 each way on paper)
NETWORK = 45e9  # bytes a second of one GPU's port between nodes (400 Gb/s on paper)
LAUNCH_SECONDS = 4e-6  # host time of a kernel, which bounds small micro-batches
LIBRARY_BYTES = 2.5 * 2**30  # contexts, communication buffers, workspaces: an allowance
USABLE = 0.94  # of the memory: the allocator fragments
HIDDEN = 0.7  # share of tensor parallel communication that parallel.tp_comm_overlap hides


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak of a device by the vendor's name for it; None where it is not known.

    Args:
        device_name: for example "NVIDIA H100 80GB HBM3".
        precision: bf16, fp8 or fp32.
    """
    peaks = {gpu.name: gpu.peak for gpu in GPUS.values()} | _OTHER_PEAKS
    words = device_name.replace("-", " ").split()
    return next((peaks[word].get(precision) for word in words if word in peaks), None)


def attention_rates(head_dim: int, keys: float) -> tuple[float, float]:
    """Forward and backward rates for a head size and a mean number of keys a query sees."""
    known = min((size for size in ATTENTION if size >= head_dim), default=max(ATTENTION))
    forward, backward = ATTENTION[known]
    filled = keys / (keys + ATTENTION_HALF_ROWS) if keys else 1.0
    return forward * filled, backward * filled


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes."""

    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus_per_node

    def bandwidth(self, size: int, stride: int) -> float:
        """Bytes a second that each rank of a group can exchange in a ring collective.

        Args:
            size: ranks of the group.
            stride: distance in rank between neighbours (Megatron-Core's order: tp, cp, dp, pp).
        """
        if (size - 1) * stride < self.gpus_per_node:
            return NVLINK
        ports = max(1, self.gpus_per_node // stride)  # members of the group on one node
        return min(NVLINK, ports * NETWORK)

    def exchange_bandwidth(self, size: int, stride: int) -> float:
        """Bytes a second that each rank of a group can send where each sends to every other.

        Args:
            size: ranks of the group.
            stride: distance in rank between neighbours.
        """
        if (size - 1) * stride < self.gpus_per_node:
            return NVLINK
        near = max(1, self.gpus_per_node // stride)  # members of the group on one node
        return min(NVLINK, NETWORK * (size - 1) / (size - near))
