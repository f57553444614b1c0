"""What happened on the null GPU: memory by phase and by kind, and what one optimizer step did."""

import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.paths import ROOT
from common.simulation import null_gpu

if TYPE_CHECKING:
    import torch

KINDS = ("weights", "gradients", "optimizer", "activations", "other")
ROUNDED_TO = 512  # bytes: every block of torch's allocator (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)
NOTHING: dict[str, Any] = {  # of a run that made no step
    "kernels": None, "host_syncs": None, "gemm_flops": {}, "attention": {}, "collectives": [], "memory_kinds": None,
    "copies": [], "top_kernels": [], "sync_places": {}, "compiled_regions": {}, "live_bytes": None, "faults": [],
}  # fmt: skip


class Phases:
    """Peaks of torch's allocator, by phase of the run."""

    def __init__(self) -> None:
        self.peaks: dict[str, dict[str, int]] = {}

    def begin(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()

    def end(self, name: str) -> None:
        """What has happened since the last end or begin was `name`."""
        import torch

        peak = {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
        before = self.peaks.get(name, peak)
        self.peaks[name] = {key: max(peak[key], before[key]) for key in peak}
        self.begin()

    def found(self) -> dict[str, Any]:
        peaks = self.peaks.values()
        return {key: max((peak[key] for peak in peaks), default=None) for key in ("peak_bytes", "reserved_bytes")} | {
            "phases": self.peaks
        }


# ---- whose memory it is ----------------------------------------------------------------------------------------------


class State:
    """The model and the optimizer of the run: where their tensors lie."""

    def __init__(self) -> None:
        self.model: Any = None
        self.optimizer: Any = None

    def keep(self, model: Any, optimizer: Any) -> None:
        """model: what the recipe trains; DeepSpeed's engine holds the optimizer too."""
        self.model = model
        self.optimizer = model.optimizer if hasattr(model, "zero_optimization_stage") else optimizer

    def kinds(self) -> dict[int, str]:
        """Address of a storage -> weights, gradients or optimizer."""
        found: dict[int, str] = {}
        if self.model is None:
            return found
        module = self.model
        while hasattr(module, "module"):  # Megatron's wrapper has an attribute `buffers` of its own
            module = module.module
        parameters: list[Any] = list(module.parameters())
        for parameter in [*parameters, *module.buffers()]:
            for tensor in (parameter, getattr(parameter, "ds_tensor", None)):  # ds_tensor: a shard of ZeRO 3
                _add(found, tensor, "weights")
        for parameter in parameters:
            for name in ("grad", "main_grad"):
                _add(found, getattr(parameter, name, None), "gradients")
        for name, tensor in _tensors([getattr(self.model, "buffers", None), self.optimizer]):
            of_gradient = any(word in name for word in ("grad", "ipg", "bucket"))
            _add(found, tensor, "gradients" if of_gradient else "optimizer")
        return found


def _add(found: dict[int, str], tensor: Any, kind: str) -> None:
    if tensor is None:
        return
    from common.training.sharding import own_rows

    storage = own_rows(tensor.detach()).untyped_storage()
    if tensor.is_cuda and storage.nbytes():
        found.setdefault(storage.data_ptr(), kind)


def _tensors(root: Any) -> Iterator[tuple[str, "torch.Tensor"]]:
    """All tensors that an optimizer holds in attributes, lists and dictionaries, with the names on the way to them."""
    import torch

    seen: set[int] = set()
    left: list[tuple[str, Any, int]] = [("", root, 0)]
    while left:
        name, value, depth = left.pop()
        if isinstance(value, torch.Tensor):
            yield name, value
            continue
        if id(value) in seen or depth > 6 or isinstance(value, torch.nn.Module | type | str | bytes):
            continue
        seen.add(id(value))
        inner: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            inner = list(value.items())
            left += [(name, key, depth + 1) for key, _ in inner if isinstance(key, torch.Tensor)]
        elif isinstance(value, list | tuple | set):
            inner = [("", one) for one in value]
        elif hasattr(value, "__dict__") and not callable(value):
            inner = list(vars(value).items())
        left += [(f"{name}.{key}" if isinstance(key, str) else name, one, depth + 1) for key, one in inner]


def live_bytes() -> int:
    """Bytes of all storages on the device that a Python object reaches."""
    return sum(live_storages("cuda").values())


def live_storages(device_type: str) -> dict[int, int]:
    """Address -> bytes of all storages on a device that a Python object reaches."""
    import gc

    import torch

    gc.collect()
    found: dict[int, int] = {}
    for value in gc.get_objects():
        try:
            # type(): a proxy's __class__ may be computed
            if issubclass(type(value), torch.Tensor) and value.device.type == device_type and value.layout == torch.strided:
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        except (ReferenceError, RuntimeError):  # a weak proxy whose object is gone; a tensor without storage
            continue
    return found


# ---- one optimizer step ----------------------------------------------------------------------------------------------


class StepTrace:
    """One step: counts of the null GPU, and the history of torch's allocator."""

    def __init__(self) -> None:
        self.sync_places: Counter[str] = Counter()
        self.result = dict(NOTHING)

    def begin(self, state: State) -> None:
        import torch

        self.kinds = state.kinds()
        torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=10_000_000)
        segments = torch.cuda.memory._snapshot()["segments"]
        blocks = [block for segment in segments for block in segment["blocks"] if block["state"] == "active_allocated"]
        self.before = {block["address"]: block["size"] for block in blocks}
        self.gradients: set[int] = set()
        self.events_of_backward = 0
        null_gpu.on_sync(self._sync)
        null_gpu.clear()
        null_gpu.record(True)

    def _sync(self) -> None:
        self.sync_places[_place()] += 1

    def backward_is_over(self, state: State) -> None:
        """Between the backward passes and the update: where are the gradients?"""
        null_gpu.record(False)
        self.gradients = {address for address, kind in state.kinds().items() if kind == "gradients"}
        self.events_of_backward = len(_history())
        null_gpu.record(True)

    def end(self, state: State) -> None:
        import torch

        null_gpu.record(False)
        history = _history()
        torch.cuda.memory._record_memory_history(enabled=None)
        self.kinds |= {address: kind for address, kind in state.kinds().items() if kind == "optimizer"}
        self.result = _counted(null_gpu.counts()) | {
            "memory_kinds": self._memory_kinds(history), "live_bytes": live_bytes(),
            "sync_places": dict(self.sync_places.most_common()),
        }  # fmt: skip

    def _memory_kinds(self, history: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Bytes by kind at the moment at which the step held the most."""
        live = {address: (-1, size) for address, size in self.before.items()}  # address -> event, bytes
        total = sum(self.before.values())
        peak, at_peak = total, dict(live)
        after_backward: dict[int, tuple[int, int]] = {}
        rises = False
        for number, event in enumerate(history):
            if number == self.events_of_backward:
                after_backward = dict(live)
            if event["action"] == "alloc":
                size = -(-event["size"] // ROUNDED_TO) * ROUNDED_TO
                live[event["addr"]] = number, size
                total += size
                rises = rises or total > peak
            elif event["action"] == "free_completed" and event["addr"] in live:
                if rises:  # `live` is what it was at the highest point until here
                    peak, at_peak, rises = max(peak, total), dict(live), False
                total -= live.pop(event["addr"])[1]
        if rises:
            at_peak = dict(live)
        kinds = dict.fromkeys(KINDS, 0)
        for address, (number, size) in at_peak.items():
            kinds[self._kind(address, number, after_backward)] += size
        return kinds

    def _kind(self, address: int, number: int, after_backward: Mapping[int, tuple[int, int]]) -> str:
        if number < 0:
            return self.kinds.get(address, "other")
        if address in self.gradients and after_backward.get(address, (None, 0))[0] == number:
            return "gradients"
        if number < self.events_of_backward:
            return "activations"
        return "optimizer" if self.kinds.get(address) == "optimizer" else "other"

    def found(self) -> dict[str, Any]:
        return self.result


def _history() -> Sequence[Mapping[str, Any]]:
    import torch

    traces: Any = torch.cuda.memory._snapshot()["device_traces"]
    return traces[torch.cuda.current_device()] if traces else []


HELPERS = {("torch", "_tensor.py"), ("torch", "_ops.py"), ("cuda", "__init__.py")}  # they only pass a call on


def _place() -> str:
    """The line of this repository, and the line of a library that it has called, at which the host waits."""
    frame: Any = sys._getframe(2)
    inner = ""
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and path.parent != Path(__file__).parent:
            outer = f"{path.relative_to(ROOT)}:{frame.f_lineno}"
            return f"{outer} > {inner}" if inner else outer
        if not inner and path.parent != Path(__file__).parent and path.parts[-2:] not in HELPERS:
            inner = "/".join([*path.parts[-2:-1], f"{path.name}:{frame.f_lineno}"])
        frame = frame.f_back
    return inner or "in a thread of C++"


def _counted(counts: Sequence[null_gpu.Count]) -> dict[str, Any]:
    """The counts of the null GPU under the names of the report."""
    by_kind: dict[str, list[null_gpu.Count]] = defaultdict(list)
    for count in counts:
        by_kind[count.kind].append(count)
    kernels = by_kind["kernel"]
    return {
        "kernels": sum(count.calls for kind in ("kernel", "gemm") for count in by_kind[kind]),
        "gemms": sum(count.calls for count in by_kind["gemm"]),
        "host_syncs": sum(count.calls for count in by_kind["sync"]),
        "gemm_flops": {count.names[0]: int(count.amount) for count in by_kind["gemm"]},
        "attention": _attention(kernels, sum(count.calls for count in by_kind["attention"])),
        "collectives": _collectives(by_kind["collective"]),
        "copies": [{"from_to": c.names[0], "calls": c.calls, "bytes": int(c.amount)} for c in by_kind["copy"]],
        "top_kernels": _named(kernels)[:40],
        "compiled_regions": {count.names[0]: count.calls for count in by_kind["region"]},
        "faults": [count.names[0] for count in by_kind["fault"]],
    }


def _collectives(counts: Sequence[null_gpu.Count]) -> list[dict[str, Any]]:
    """bytes: of all calls together; of an all-gather its output, of a reduce-scatter its input."""
    return [
        {"op": op, "dtype": dtype, "calls": count.calls, "bytes": int(count.amount), "group_size": int(size)}
        for count in counts
        for op, dtype, size in [count.names]
    ]


# A kernel of the forward pass -> the backend whose it is
ATTENTION = {r"flash_fwd(_splitkv)?_kernel": "flash", r"fmha_cutlassF": "efficient", r"cudnn.*(flash|mha)": "cudnn"}


def _attention(kernels: Sequence[null_gpu.Count], calls: int) -> dict[str, int]:
    """calls: of scaled_dot_product_attention. Those without a kernel of their own are made of products and a softmax: math."""
    by_backend: Counter[str] = Counter()
    for count in kernels:
        for pattern, backend in ATTENTION.items():
            if re.search(pattern, count.names[0]):
                by_backend[backend] += count.calls
    by_backend["math"] = calls - by_backend.total()
    return {backend: n for backend, n in by_backend.items() if n > 0}


def _named(kernels: Sequence[null_gpu.Count]) -> list[dict[str, Any]]:
    """Kernels by a short name: the function, and what it is instantiated with."""
    names = "\n".join(count.names[0] for count in kernels)
    plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True).stdout.splitlines()
    calls: Counter[str] = Counter()
    for count, name in zip(kernels, plain or names.splitlines(), strict=True):
        calls[_short(name)] += count.calls
    return [{"kernel": name, "calls": n} for name, n in calls.most_common()]


def _short(name: str) -> str:
    """'void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, ...>' ->
    'vectorized_elementwise_kernel CUDAFunctor_add'"""
    function = re.sub(r"^void ", "", name.replace("(anonymous namespace)::", "")).partition("<")[0].partition("(")[0]
    inner = re.findall(r"\w*(?:[Ff]unctor\w*|_kernel_cuda|_cuda|Ops)\b", name.partition("<")[2])
    words = [function.rpartition("::")[2], *dict.fromkeys(word for word in inner if "gpu_kernel" not in word)]
    return " ".join(words[:3])
