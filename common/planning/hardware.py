"""Constants of GPUs and networks from which step_time.py predicts. Imports no torch.

Every number is one of three kinds, named beside it: of a datasheet; measured, with the source; fitted, with the rows.
"""

import re
from dataclasses import dataclass

from common.errors import BadInput
from common.planning.flops import peak_tflops


@dataclass(frozen=True)
class Gpu:
    """One GPU. Bandwidths in bytes/s in one direction."""

    name: str
    memory: int  # bytes that processes can allocate: what torch's out-of-memory messages call total capacity
    hbm: float  # bandwidth of the memory, of a datasheet
    nvlink: float  # to the other GPUs of the node, of a datasheet
    network: float  # to other nodes per GPU, in the usual server with one network card per GPU
    pcie: float  # to the memory of the host
    host_memory: float  # bandwidth of the host's memory per GPU, in the usual server with 8 GPUs and 2 CPUs
    gemm: float  # share of the peak that an unboundedly large matrix product reaches
    # a product (m, n, k) reaches gemm / ((1 + a/m)(1 + b/n)(1 + c/k)) of the peak
    gemm_sizes: tuple[float, float, float]
    # FLOP/s of fused attention kernels that count every pair of positions, forward: {kernel: rate}
    attention: dict[str, float]
    flops: float | None = None  # a CPU's peak (cpu.py), which flops.py does not have

    @property
    def is_cpu(self) -> bool:
        return self.flops is not None

    @property
    def peak(self) -> float:
        """FLOP/s of dense bf16 matrix products (fp16 before Ampere)."""
        if self.flops is not None:
            return self.flops
        peak = peak_tflops(self.name)
        if peak is None:
            raise BadInput(f"{self.name}: its peak is not in common/planning/flops.py")
        return peak * 1e12


GIB = 2**30
# a, b, c: least squares over the 183 matrix products that MooreThreads/SimuMax measured on an A100
# (configs/system/a100_pcie.json): median error 1.8 %, 95 % of the products within 17 %.
A100_SIZES = (175.0, 174.0, 131.0)
# FlashAttention-3 (arXiv:2407.08608), figure 5: head size 128, 4,096 positions, no mask, forward, on an H100.
# efficient, which takes masks and biases: half of fa2, not measured on an H100.
H100_ATTENTION = {"fa2": 368e12, "cudnn": 609e12, "fa3": 638e12, "efficient": 184e12}
# FlashAttention-2 (arXiv:2307.08691), figure 5: the same on an A100; efficient is the curve of xFormers.
A100_ATTENTION = {"fa2": 205e12, "efficient": 100e12}
# PCIe 3, 4 and 5 x16: 16, 32 and 64 GB/s in one direction. Memory of the hosts, 2 CPUs of 6 or 8 channels: DGX-2 (DDR4-2666),
# DGX A100 (DDR4-3200), DGX H100 (DDR5-4800) and DGX B200 (DDR5-5600), per GPU.
GPUS = [
    # V100 datasheet: 900 GB/s, NVLink 150 GB/s; DGX-2: one EDR card (100 Gb/s) per two GPUs. gemm: the A100's, not measured.
    Gpu("V100", int(31.7 * GIB), 900e9, 150e9, 6.25e9, 16e9, 32e9, 0.77, A100_SIZES, {}),
    # A100 datasheets: 1,555 and 2,039 GB/s, NVLink 300 GB/s; Selene: 8 HDR cards (200 Gb/s) per node (arXiv:2104.04473,
    # section 5). gemm: fitted on the ten rows of PTD-P's table 1.
    Gpu("A100-40GB", int(39.4 * GIB), 1555e9, 300e9, 25e9, 32e9, 51e9, 0.773, A100_SIZES, A100_ATTENTION),
    Gpu("A100", int(79.1 * GIB), 2039e9, 300e9, 25e9, 32e9, 51e9, 0.773, A100_SIZES, A100_ATTENTION),
    # H100 and H200 datasheets (SXM): 3,350 and 4,800 GB/s, NVLink 450 GB/s; Eos: 8 NDR cards (400 Gb/s) per node. gemm: fitted
    # on the nine rows of the H100 table in Megatron-LM's README.
    Gpu("H100", int(79.2 * GIB), 3350e9, 450e9, 50e9, 64e9, 77e9, 0.571, A100_SIZES, H100_ATTENTION),
    Gpu("H200", int(139.8 * GIB), 4800e9, 450e9, 50e9, 64e9, 77e9, 0.571, A100_SIZES, H100_ATTENTION),
    # HGX B200 datasheet: 8,000 GB/s, NVLink 900 GB/s. gemm and sizes: least squares over SimuMax's measured B200 products.
    # Attention: the H100's rates x the ratio of the peaks, not measured.
    Gpu("B200", int(178.3 * GIB), 8000e9, 900e9, 50e9, 64e9, 90e9, 0.54, (137.0, 96.0, 207.0),
        {name: rate * 2250 / 989.4 for name, rate in H100_ATTENTION.items()}),
]  # fmt: skip


def gpu(name: str) -> Gpu:
    """The GPU of this name: A100, A100-80GB, H100, ... BadInput for a name that is not in the table."""
    wanted = re.sub(r"[-_ ]?80 ?GB$|[-_ ]SXM\d?$|^NVIDIA ", "", name.strip(), flags=re.IGNORECASE)
    for one in GPUS:
        if one.name.lower() == wanted.lower():
            return one
    raise BadInput(f"--gpu {name}: must be one of {', '.join(one.name for one in GPUS)}")


# Names that torch.cuda.get_device_name() gives, of the SXM modules that the table has
DEVICES = {r"V100-SXM": "V100", r"A100-SXM4-40GB": "A100-40GB", r"A100-SXM4-80GB": "A100", r"H100 80GB HBM3": "H100",
           r"NVIDIA H200$": "H200", r"NVIDIA B200$": "B200"}  # fmt: skip


def gpu_of_device(name: str) -> Gpu:
    """The GPU of a device's name, such as NVIDIA H100 80GB HBM3. BadInput for one that is not in the table."""
    for pattern, known in DEVICES.items():
        if re.search(pattern, name):
            return gpu(known)
    raise BadInput(f"{name}: is not in common/planning/hardware.py, which has {', '.join(DEVICES.values())} (SXM); add a row")


HOST_MEMORY = 2e12  # bytes of a node: DGX H100 (datasheet, 2023)


@dataclass(frozen=True)
class Cluster:
    """The GPUs and what connects them."""

    gpu: Gpu
    gpus_per_node: int = 8
    network: float | None = None  # bytes/s per GPU in one direction; default: the GPU's usual server
    host_memory: float = HOST_MEMORY  # bytes of a node, for what is offloaded

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Bytes/s at which one rank of a group sends, if the group's `ranks` ranks lie `stride` apart.

        The k ranks that a group has in one node drive k network cards at once, so a ring over several nodes is k times as
        fast as one card, up to the rate of NVLink.
        """
        together = max(1, self.gpus_per_node // stride)  # ranks of the group in one node
        if ranks <= together:
            return self.gpu.nvlink
        card = self.gpu.network if self.network is None else self.network
        return min(self.gpu.nvlink, card * together)


def network(text: str, gpus_per_node: int) -> float:
    """'8x400Gb', the cards of a node -> bytes/s per GPU in one direction."""
    match = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)Gb", text)
    if not match or not float(match[2]) or match[1] == "0":
        raise BadInput(f"--network {text}: must be CARDSxRATEGb, the cards per node and their rate, such as 8x400Gb")
    return int(match[1] or 1) * float(match[2]) * 1e9 / 8 / gpus_per_node
