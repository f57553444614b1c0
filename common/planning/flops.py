"""Peak FLOP/s of a GPU, and model FLOP utilization (MFU). The FLOPs per token come from task.py. Imports no torch."""

import re
from functools import cache

# TFLOP/s (10^12 FLOPs per second) of dense bf16 matrix products with fp32 accumulation, as NVIDIA publishes them. Where a
# datasheet gives only the figure "with sparsity", the table has half of it. GPUs before Ampere have no bf16, so the table has
# their fp16 peak. The first pattern that matches the GPU's name (from torch.cuda.get_device_name()) counts.
PEAK_TFLOPS: list[tuple[str, float]] = [
    (r"GB200", 2500.0),  # GB200 NVL72 datasheet, 5,000 sparse
    (r"B200", 2250.0),  # HGX B200 datasheet, 4,500 sparse
    (r"H[12]00 NVL", 835.5),  # H100 and H200 datasheets, NVL column, 1,671 sparse
    (r"H100 PCIe", 756.0),  # H100 datasheet, PCIe column, 1,513 sparse
    (r"GH200|H200|H100|H800", 989.4),  # H100 architecture white paper, table 2, SXM5
    (r"A100|A800", 312.0),  # A100 datasheet, SXM and PCIe alike
    (r"A30\b", 165.0),  # A30 datasheet
    (r"A10G?\b", 125.0),  # A10 datasheet
    (r"A40\b", 149.7),  # A40 datasheet
    (r"A6000", 154.8),  # GA102 white paper
    (r"L40S", 362.05),  # L40S datasheet
    (r"L40\b", 181.05),  # L40 datasheet
    (r"L4\b", 121.0),  # L4 datasheet, 242 sparse
    (r"6000 Ada", 364.2),  # RTX 6000 Ada datasheet, 1,457 sparse in fp8
    (r"RTX 5090\b(?! D| Laptop)", 209.5),  # RTX Blackwell white paper
    (r"RTX 4090\b(?! D| Laptop)", 165.2),  # Ada white paper, appendix A
    (r"RTX 3090\b(?! Ti)", 71.0),  # GA102 white paper, appendix A
    (r"V100S", 130.0),  # V100S datasheet, fp16
    (r"V100-PCIE|V100 PCIe", 112.0),  # V100 datasheet, fp16
    (r"V100", 125.0),  # V100 datasheet, SXM2, fp16
    (r"\bT4\b", 65.0),  # T4 datasheet, fp16
]


@cache
def peak_tflops(gpu_name: str | None) -> float | None:
    """TFLOP/s of one GPU (see PEAK_TFLOPS); None for a CPU, for a GPU that is not in the table, and for a MIG slice."""
    if not gpu_name or "MIG" in gpu_name:
        return None
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, gpu_name, re.IGNORECASE)), None)


def mfu(flops_per_token: float, tokens_per_s: float, gpu_name: str | None, gpus: int) -> float | None:
    """Share (0 to 1) of the GPUs' peak that the model's own FLOPs use; None if the peak is unknown.

    flops_per_token: 'full' or 'causal' of `task.forward_backward_flops`; state which of them beside the MFU.
    tokens_per_s: the sum over all GPUs.

    The definition is PaLM's (arXiv:2204.02311, appendix B): recomputed FLOPs do not count. The peak is always that of bf16,
    whatever the run's dtype, so an fp32 run has a low MFU.
    """
    peak = peak_tflops(gpu_name)
    return None if peak is None else flops_per_token * tokens_per_s / (peak * 1e12 * gpus)
