"""The start and end of every process of a run: device, process group, signals, random states, exit codes."""

import contextlib
import ctypes
import datetime
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from common import screen
from common.checkpoints import checkpoint
from common.errors import DISK_ERRORS, EXIT_BAD_INPUT, EXIT_NOT_FINITE, EXIT_SIGINT, EXIT_SIGTERM, BadInput
from common.launch import heartbeat, lock, startup
from common.seeding import derive_seed

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from common.config import Train

# Of a collective: long enough for one rank to export 175 billion parameters while the others wait. The launcher detects hangs
# (train.hang_seconds).
TIMEOUT = datetime.timedelta(days=1)

# NVLink SHARP adds in the switch, in no fixed order; Megatron-LM asks for the same (megatron/training/arguments.py)
NCCL_ALGO = "^NVLS"

# Beginnings of warnings that say nothing about a run: Megatron Core 0.19 warns of its own defaults and of what it does itself
NOISE = (
    "full scope is deprecated", "MimoModelConfig is experimental", "The .grad attribute of a Tensor that is not a leaf",
    "OMP_NUM_THREADS/MKL_NUM_THREADS unset",  # accelerate, which sets it
    "FSDP2-wrapped module .FSDPT5Block. returned a view tensor",  # the relative biases, which no layer adds to in place
)  # fmt: skip

_signal = 0  # the signal that asked this process to save and stop
_before_exit: list[Callable[[], None]] = []


class Ranks(NamedTuple):
    """This process among those of the run."""

    rank: int
    world: int
    device: "torch.device"


class Stopped(Exception):
    """The run ends early with this exit code. Whatever had to be saved is saved."""

    def __init__(self, code: int, why: str):
        super().__init__(why)
        self.code = code


def quiet() -> None:
    """Silence what libraries print on import, except errors. In a rank of a launch, also write the first heartbeat."""
    heartbeat.begin()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    # Segments that grow in place leave no gaps between them: less memory is reserved. torch reads it at the first allocation
    # (PyTorch documentation, "CUDA semantics", "Optimizing memory usage with PYTORCH_ALLOC_CONF").
    if not any(f"PYTORCH_{name}ALLOC_CONF" in os.environ for name in ("", "CUDA_", "HIP_")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    logging.disable(logging.WARNING)


def start() -> Ranks:
    """Join the process group of torchrun (without torchrun: a group of one) and listen to SIGTERM and SIGINT."""
    import torch
    import torch.distributed as dist

    startup.begin()
    _die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _remember)
    screen.outlive_readers()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    device = _device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _show_warnings()
    if not dist.is_initialized():
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        heartbeat.wait("process group")
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=TIMEOUT, device_id=bound)
        else:
            store = torch._C._distributed_c10d.HashStore()
            dist.init_process_group(backend, timeout=TIMEOUT, device_id=bound, store=store, rank=0, world_size=1)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # DeepSpeed reads these although the group exists
        heartbeat.beat("preparation")
    startup.done(startup.processes(dist.get_world_size(), device))
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _show_warnings() -> None:
    """From now on the first rank prints each warning of a library once. Hidden are those of imports, those about future
    versions, which are for developers, and NOISE."""
    warnings.simplefilter("ignore")
    if os.environ["RANK"] != "0":
        return
    for category in (UserWarning, RuntimeWarning):
        warnings.simplefilter("once", category)
    for beginning in NOISE:
        warnings.filterwarnings("ignore", beginning)

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        package = filename.rpartition("site-packages/")[2].partition("/")[0] or Path(filename).name
        print(f"warning: {package}: {' '.join(str(message).split())[:300]}", file=sys.stderr, flush=True)

    warnings.showwarning = show


def _device() -> "torch.device":
    """The GPU of this rank, or the CPU. BadInput if torchrun started more ranks than this node shows GPUs.

    It is LOCAL_RANK modulo the visible GPUs: a scheduler or a container may show each rank its own GPU alone. LOCAL_RANK is set
    to the number of that GPU, because DeepSpeed, accelerate and torch take it from there.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, visible = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    is_shared = local >= visible and "TORCHELASTIC_RUN_ID" in os.environ  # torchrun shows all of its ranks the same GPUs
    if is_shared and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "0") == "0":
        raise BadInput(
            f"NPROC={os.environ.get('LOCAL_WORLD_SIZE')} and this node shows {visible} GPU{'s' * (visible > 1)}: NCCL refuses "
            f"two ranks on one GPU; type NPROC={visible}"
        )
    os.environ["LOCAL_RANK"] = str(local % visible)
    return torch.device("cuda", local % visible)


def before_exit(function: Callable[[], None]) -> None:
    """Call this function, and no earlier one, when `run` ends this process, also after Stopped and bad input."""
    _before_exit[:] = [function]


def _remember(number: int, _frame: object) -> None:
    global _signal
    _signal = number


def stop_requested() -> int:
    """The signal that this process got, 0 for none. `reduce_step` shares it among the ranks."""
    return _signal


def forget_signal() -> None:
    """Forget a signal that stopped an earlier run in this process, so that it does not stop the next one."""
    global _signal
    _signal = 0


def stopped(number: int, step: int) -> Stopped:
    """The end of a run that signal `number`, shared among the ranks, has asked for and that has saved `step`."""
    code = EXIT_SIGINT if number == signal.SIGINT else EXIT_SIGTERM
    return Stopped(code, f"stopped after step {step}, state saved; the same command continues")


def _die_with_parent() -> None:
    """Linux: a rank whose torchrun is killed must not continue alone and write into OUT (prctl PR_SET_PDEATHSIG)."""
    agent = os.environ.get("TWINSTACK_AGENT")  # process id of common/launch/agent.py
    if sys.platform == "linux" and agent:
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
        if os.getppid() != int(agent):  # it died before this rank got here
            os._exit(1)


def seed_micro_batch(seed: int, step: int, micro_batch: int, dp_rank: int, stage: int = 0) -> int:
    """Seed torch's generators for one micro batch, so that dropout is a function of these five alone. Returns the seed."""
    import torch

    heartbeat.beat(f"micro batch {micro_batch + 1}")
    value = derive_seed("dropout", seed, step, micro_batch, dp_rank, *[stage] * (stage > 0))
    torch.manual_seed(value)
    return value


def check_dtype(dtype: str, device: "torch.device") -> None:
    """BadInput for bf16 on a GPU that only emulates it (compute capability below 8.0)."""
    import torch

    if dtype == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise BadInput(f"train.dtype=bf16: {name} has no bf16 arithmetic; use train.dtype=fp32")


def set_numerics(train: "Train", ranks: Ranks) -> None:
    """Check train.dtype as check_dtype does, and let train.deterministic choose the kernels of a GPU. A CPU's always repeat
    their bits. BadInput where NCCL may add in another order each time."""
    import torch

    check_dtype(train.dtype, ranks.device)
    if ranks.device.type != "cuda":
        return
    if train.deterministic:
        if ranks.world > 1 and "NCCL_ALGO" not in os.environ:
            raise BadInput(f"train.deterministic=true: set NCCL_ALGO={NCCL_ALGO} in the environment of all {ranks.world} ranks")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS documentation, "Results reproducibility"
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # TransformerEngine's attention
    # The backward passes of flash and memory-efficient attention then add in a fixed order, and cuDNN's attention is not used
    # (PyTorch documentation, "Reproducibility"). Operators that have no such kernel raise an error.
    torch.use_deterministic_algorithms(train.deterministic)
    torch.backends.cudnn.deterministic = train.deterministic
    fills: Any = torch.utils.deterministic  # mypy does not know its attribute
    fills.fill_uninitialized_memory = False  # else a kernel for each new tensor


def on_device(tensor: "torch.Tensor", device: "torch.device | str") -> "torch.Tensor":
    """A CPU tensor on `device`. A GPU copies it from pinned memory while the CPU continues; before a copy from pageable memory
    the CPU waits for the GPU (CUDA Runtime API, "API synchronization behavior")."""
    on_gpu = str(device).startswith("cuda")
    return (tensor.pin_memory() if on_gpu else tensor).to(device, non_blocking=True)


def totals(numbers: Sequence[int], ranks: Ranks, group: "dist.ProcessGroup | None" = None) -> list[int]:
    """Sum numbers over the ranks of `group` (default: all)."""
    import torch
    import torch.distributed as dist

    if dist.get_world_size(group) == 1:
        return list(numbers)
    values = on_device(torch.tensor(numbers, dtype=torch.int64), ranks.device)
    heartbeat.wait("sum of counts")
    dist.all_reduce(values, group=group)
    summed: list[int] = values.tolist()
    heartbeat.beat("forward and backward")
    return summed


def reduce_step(
    shares: "torch.Tensor", ranks: Ranks, step: int, samples: range, is_updated: bool = False
) -> tuple[list[float], int]:
    """Sum the ranks' shares of the loss and its parts, and learn whether any was asked to stop: one all-reduce per step.

    shares: (k,). Called after the backward passes and before the optimizer's update, or with is_updated after it: a sum that is
    not finite ends the run there. Returns the k sums and the signal's number (0: go on).
    """
    import torch
    import torch.distributed as dist

    signals = torch.tensor([stop_requested() == signal.SIGTERM, stop_requested() == signal.SIGINT], dtype=torch.float64)
    both = torch.cat([shares.double(), on_device(signals, ranks.device)])
    heartbeat.wait("sum of the loss")
    if ranks.world > 1:
        dist.all_reduce(both)
    *values, terms, interrupts = both.tolist()
    heartbeat.beat("update")
    number = signal.SIGTERM if terms else signal.SIGINT if interrupts else 0
    for value in values:
        must_be_finite("loss", value, step, samples, when="" if is_updated else " before the update")
    return values, int(number)


def must_be_finite(what: str, value: float, step: int, samples: range, when: str = "") -> None:
    """End the run with exit code 3 if a loss or gradient norm is NaN or infinite. That step is not saved."""
    if not math.isfinite(value):
        raise Stopped(
            EXIT_NOT_FINITE,
            f"error: the {what} of step {step} is {value} (samples {samples.start} to {samples.stop - 1}): stopped{when}, "
            "nothing saved; the last checkpoint is as it was",
        )


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Entry point of a rank: `main(argv)`, then leave the group and exit with the code that the launcher passes on."""
    quiet()
    if {"-h", "--help"} & set(sys.argv[1:]):
        script = Path(sys.argv[0]).with_suffix(".sh")
        print(f"usage: bash {script} CONFIG OUT [section.key=value ...] (see its --help); it starts this on every rank")
        sys.exit(0)
    if len(sys.argv) < 3 and "RANK" not in os.environ:  # typed, not started by torchrun
        script = Path(sys.argv[0]).with_suffix(".sh")
        print(f"error: CONFIG and OUT are missing; type bash {script} CONFIG OUT", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    global _signal
    _signal = 0
    code = 0
    lines: list[str] = []
    try:
        main(sys.argv[1:])
    except BadInput as error:
        code, lines = EXIT_BAD_INPUT, [f"error: {line}" for line in error.problems]
    except Stopped as stop:
        code, lines = stop.code, [str(stop)]
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = error.filename or "writing into OUT"
        again = "the checkpoints are whole, and the same command continues"
        code, lines = EXIT_BAD_INPUT, [f"error: {where}: {error.strerror}; correct that: {again}"]
    except Exception:
        if _recorded() != EXIT_BAD_INPUT:  # else another rank has reported the reason, and its end broke a collective here
            raise
        code = EXIT_BAD_INPUT
    if code == EXIT_BAD_INPUT:  # which one rank alone may have seen: the others do not finish a save with it
        checkpoint.forget()
    for function in _before_exit:
        try:
            with contextlib.suppress(OSError):  # a full disk, which the run has reported
                function()
        except BadInput as error:  # of a save in the background
            code, lines = EXIT_BAD_INPUT, [f"error: {line}" for line in error.problems]
    first = bool(code) and _record(code, lines)
    if code != EXIT_BAD_INPUT:  # all ranks stop together, on every node
        first = os.environ.get("RANK", "0") == "0"
    if first and lines:  # bad input may be seen by one rank alone (its node lacks a file): the first one prints it
        print("\n".join(lines), file=sys.stderr, flush=True)
    import torch.distributed as dist

    if dist.is_initialized() and code != EXIT_BAD_INPUT:  # the others may wait in a collective: torchrun ends them
        dist.destroy_process_group()
    heartbeat.beat(heartbeat.DONE)
    lock.release()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a normal exit would wait seconds for worker threads of the stacks


def _record(code: int, lines: Sequence[str] = ()) -> bool:
    """Report the exit code and its reason to the launcher (torchrun reports 1 for every failure). True if this rank is the
    first of its node to do so."""
    path = os.environ.get("TWINSTACK_EXIT_CODE")
    if not path:
        return True
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write("\n".join([str(code), *lines]))
    except FileExistsError:
        return False
    return True


def _recorded() -> int:
    """The exit code that a rank of this node has reported to the launcher, 0 if none has."""
    try:
        with open(os.environ.get("TWINSTACK_EXIT_CODE", ""), encoding="utf-8") as file:
            return int(file.readline() or 0)
    except FileNotFoundError:
        return 0
