"""A CPU as a row of hardware.py. Its constants are measured where the runs were: in as many processes, of as many threads.

torchrun --standalone --nproc-per-node N -m common.planning.cpu FILE    every rank; FILE holds the shapes, then the result
"""

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import BadInput
from common.paths import ROOT
from common.planning.hardware import Gpu
from common.planning.step_time import BUS_SHARE, CAUSAL_LOSS, HBM_SHARE
from common.planning.workload import Workload, products_of

PRODUCTS, LAYERS = 12, 4  # that are measured, at most
SECONDS = 0.15  # of each measurement
ATTEMPTS, PATIENCE, DISTURBED = 3, 30, 0.15  # seconds to wait for idle cores; cores that other processes may use
COPIED, REDUCED = 2**24, 2**21  # numbers in fp32

Values = dict[str, Any]  # what `measure` finds


def name() -> str:
    """Of this machine's CPU, and its cores."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def shapes(works: Sequence[tuple[Workload, int]]) -> Values:
    """What to measure for workloads and their micro batches: some of their matrix products, of all sizes, attentions, and the
    (tokens, hidden, ffn) of layers, for their elementwise kernels."""
    products: set[tuple[int, int, int]] = set()
    attentions: set[tuple[int, int, int, int, bool]] = set()
    layers: set[tuple[int, int, int]] = set()
    for work, micro in works:
        for block in work.blocks:
            own, *_ = block.attention
            attentions.add((micro, block.heads, own.queries, block.inner // block.heads, own.causal))
            layers.add((block.tokens * micro, block.hidden, block.ffn))
            products |= {(m * micro, n, k) for m, n, k in products_of(block, 1)}
        products.add((int(micro * work.logit_tokens), work.vocab, work.hidden))
    return {
        "products": spread(sorted(products, key=math.prod), PRODUCTS), "attentions": spread(sorted(attentions), LAYERS),
        "layers": spread(sorted(layers), LAYERS),
    }  # fmt: skip


def spread[T](values: Sequence[T], count: int) -> list[T]:
    """At most `count` of the values, from the first to the last."""
    return list(dict.fromkeys(values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)))


def undisturbed[T](run: Callable[[], T]) -> T:
    """What `run` returns, once other processes have left the cores to those of this group meanwhile; all ranks call it.
    BadInput if they do not."""
    import psutil
    import torch
    import torch.distributed as dist

    def others() -> float:
        """Seconds of the cores that other processes have used."""
        own = torch.tensor(time.process_time(), dtype=torch.float64)
        dist.all_reduce(own)
        times = psutil.cpu_times()
        return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - own)

    for _ in range(ATTEMPTS):
        if dist.get_rank() == 0:
            end = time.perf_counter() + PATIENCE
            while psutil.cpu_percent(interval=1) > 5 and time.perf_counter() < end:
                pass
        dist.barrier()
        before, begin = others(), time.perf_counter()
        result = run()
        share = torch.tensor((others() - before) / (time.perf_counter() - begin))
        dist.all_reduce(share, dist.ReduceOp.MAX)
        if share < DISTURBED:
            return result
    raise BadInput(f"other processes use {share:.1f} of this machine's cores; measure again when nothing else runs")


def reason(text: str) -> str:
    """Why ranks have ended, from what they have written to standard error."""
    found = re.findall(r"^(?:.*BadInput|error): (.*)", text, re.MULTILINE)
    return found[0] if found else text.strip()[-500:]


def measured(ranks: int, threads: int, works: Sequence[tuple[Workload, int]]) -> Values:
    """`measure` in `ranks` new processes of this machine: some 10 s."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "values.json"
        file.write_text(json.dumps(shapes(works)), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        command += ["-m", "common.planning.cpu", str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise BadInput(f"this CPU cannot be measured: {reason(done.stderr)}")
        values: Values = json.loads(file.read_text(encoding="utf-8"))
    return values


def measure(wanted: Values) -> Values:
    """Seconds of matrix products, and rates of attention, elementwise kernels, copies and all-reduce; every rank of a process
    group calls it."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    torch.manual_seed(0)
    ranks = dist.get_world_size()

    def seconds(run: Callable[[], Any], count: int | None = None) -> float:
        """Median; all ranks begin together."""
        run()
        dist.barrier()
        taken: list[float] = []
        while len(taken) < count if count else sum(taken) < SECONDS or len(taken) < 3:
            begin = time.perf_counter()
            run()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    def both(inputs: list[Any], grad: Any, causal: bool) -> None:
        q, k, v = inputs
        F.scaled_dot_product_attention(q, k, v, is_causal=causal).backward(grad)

    def there_and_back(function: Callable[[], Any]) -> None:
        result = function()
        result.backward(result.detach())

    products = []
    for m, n, k in wanted["products"]:
        x, weight, grad = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
        products.append([m, n, k, seconds(partial(F.linear, x, weight))])
        products.append([k, n, m, seconds(partial(torch.matmul, grad.t(), x))])  # of the weight's gradient
    rates = []
    for batch, heads, length, size, causal in wanted["attentions"]:
        inputs = [torch.randn(batch, heads, length, size, requires_grad=True) for _ in range(3)]
        run = partial(both, inputs, torch.randn(batch, heads, length, size), causal)
        flops = 4.0 * batch * length * length * heads * size * (0.5 * CAUSAL_LOSS if causal else 1.0)
        rates.append(flops * (1 + 2.5 / 0.8) / seconds(run))  # as step_time.attention counts both passes
    moved = spent = 0.0
    for tokens, hidden, ffn in wanted["layers"]:
        x, unit = torch.randn(tokens, hidden, requires_grad=True), torch.randn(tokens, ffn, requires_grad=True)
        norm, gelu = partial(F.layer_norm, x, (hidden,)), partial(F.gelu, unit, approximate="tanh")
        spent += seconds(partial(there_and_back, norm)) + seconds(partial(there_and_back, gelu))
        moved += 4 * tokens * (7 * hidden + 5 * ffn)  # as search.eager_traffic counts them
    source, target = torch.randn(COPIED), torch.empty(COPIED)
    copied = 8.0 * COPIED / seconds(lambda: target.copy_(source))
    exchange = None
    if ranks > 1:
        buffer = torch.zeros(REDUCED)
        exchange = 2 * (ranks - 1) / ranks * 4 * REDUCED / seconds(lambda: dist.all_reduce(buffer), 9) / BUS_SHARE
    return {
        "ranks": ranks, "threads": torch.get_num_threads(), "products": products,
        "attention": statistics.median(rates), "elementwise": moved / spent / HBM_SHARE, "memory": copied / HBM_SHARE,
        "exchange": exchange,
    }  # fmt: skip


def row(values: Values) -> Gpu:
    """Measured values as constants. Rate and sizes of the products by least squares of log errors."""
    from scipy.optimize import least_squares

    products = values["products"]

    def errors(x: Any) -> list[float]:
        rate, *sizes = map(math.exp, x)
        return [
            math.log(2 * m * n * k / rate * math.prod(1 + a / b for a, b in zip(sizes, (m, n, k), strict=True)) / taken)
            for m, n, k, taken in products
        ]

    start = math.log(max(2 * m * n * k / taken for m, n, k, taken in products))
    fitted = least_squares(errors, [start, 2.0, 2.0, 2.0], bounds=([0.0] * 4, [math.inf, 7.0, 7.0, 7.0]), loss="soft_l1")
    rate, a, b, c = map(math.exp, map(float, fitted.x))
    link, memory = values["exchange"] or math.inf, values["memory"]
    return Gpu(
        "CPU", sys.maxsize, values["elementwise"], link, link, memory, memory, 1.0, (a, b, c),
        {name: values["attention"] for name in ("fa2", "efficient")}, flops=rate,
    )  # fmt: skip


def main() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    file = Path(sys.argv[1])
    wanted = json.loads(file.read_text(encoding="utf-8"))
    values = undisturbed(lambda: measure(wanted))
    if dist.get_rank() == 0:
        file.write_text(json.dumps(values), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
