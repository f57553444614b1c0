"""From a launch script to running ranks: `python -m common.launch recipes.gpt.megatron.pretrain CONFIG OUT [a.b=c]`.

The launcher checks everything on the host first (torch-free, under a second), because an error would be lost among the output
of the ranks. Then it starts torchrun, passes signals on to the ranks, waits for their save however long it takes, and exits
with their exit code.
"""

import contextlib
import ctypes
import glob
import importlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.checkpoints import checkpoint
from common.config import STACKS
from common.errors import EXIT_BAD_INPUT, EXIT_CODES, EXIT_HANG, EXIT_SIGINT, EXIT_SIGTERM, BadInput, shortened
from common.launch import elastic, heartbeat, lock, processes, startup
from common.launch.watch import Failure, Watch
from common.paths import find
from common.screen import WIDTH, duration, error_line, field, outlive_readers

if TYPE_CHECKING:
    from common.preflight import Run

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # each means: save and stop
DEFAULT_PORT = 29500
RESTARTS, REGROUP_SECONDS = 3, 30  # of elastic runs; the second is torchrun's last_call_timeout
USAGE = """\
usage: bash {script} CONFIG OUT
            [a.b=c ...] [--dry-run]
       bash {script} --help-config [SECTION]

CONFIG     a YAML file, for example {example}
OUT        folder of the run; the same command again continues it
a.b=c      overrides a value of CONFIG: section.key=value
--dry-run  print the resolved config, its size and the torchrun command; start
           nothing
--help-config
           print every key of a config, or of one SECTION, with its default

NPROC      processes on this node (default: its GPUs, else 1)
NNODES NODE_RANK MASTER_ADDR MASTER_PORT
           several nodes: how many, which one this is (from 0), address and port
           of node 0; under srun they are known
NNODES=MIN:MAX MAX_RESTARTS REGROUP_SECONDS
           elastic: a node that is lost or joins changes the number of
           data-parallel ranks, and the run goes on from its last checkpoint;
           node 0 must stay. At most MAX_RESTARTS times after a failure (default
           {restarts}); without all of MAX nodes after REGROUP_SECONDS (default {regroup})

exit code: {exit_codes}"""


TASKS = {"pretrain": "task"}  # pretrain.py uses recipes/FAMILY/task.py; any other script the module of its own name
EXAMPLES = {"pretrain": "tiny", "finetune": "finetune_*"}


class Command(NamedTuple):
    config: str
    out: str
    overrides: list[str]
    dry_run: bool


class Nodes(NamedTuple):
    nproc: int  # processes on this node
    nnodes: int
    node_rank: int
    master_addr: str | None  # None: one node
    master_port: int | None  # None: any free one
    least: int = 0  # nodes of an elastic run, `nnodes` at most; 0: not elastic
    restarts: int = 0  # after failures, of an elastic run
    regroup_seconds: int = 0
    worlds: tuple[int, ...] = ()  # numbers of ranks with which an elastic run can go on

    @property
    def world(self) -> int:
        return self.nproc * self.nnodes

    @property
    def is_elastic(self) -> bool:
        return self.least > 0

    @property
    def possible_worlds(self) -> list[int]:
        """Numbers of ranks that an elastic run may have; empty if it is not elastic."""
        return [self.nproc * nodes for nodes in range(self.least, self.nnodes + 1)] if self.is_elastic else []


# ---- arguments and environment


def parse(argv: Sequence[str], script: str) -> Command:
    """The arguments of a launch script; options may be anywhere among them."""
    unknown = [a for a in argv if a.startswith("-") and a != "--dry-run"]
    words = [a for a in argv if not a.startswith("-")]
    problems = [
        f"unknown option {a}; a key of the config is given without dashes, {a.lstrip('-')}"
        if re.match(r"--\w+(\.\w+)+=", a)
        else f"unknown option {a}; the options are --dry-run, --help and --help-config"
        for a in unknown
    ]
    problems += [f"{shortened(word)}: must be UTF-8" for word in words if any("\ud800" <= c <= "\udfff" for c in word)]
    problems += [f"{name} is empty" for name, word in zip(("CONFIG", "OUT"), words, strict=False) if not word]
    if not words:
        problems.append(f"CONFIG and OUT are missing; type: {script} CONFIG OUT [section.key=value ...] (or --help)")
    elif len(words) == 1 or re.match(r"\w+(\.\w+)+=", words[1]):
        example = " ".join([words[0], f"out/{Path(words[0]).stem}", *words[1:]])
        problems.append(f"OUT is missing; type: {script} {example}")
    elif words[1].endswith(".yaml") and not words[0].endswith(".yaml"):
        problems.append(f"CONFIG comes before OUT; type: {script} {shlex.join([words[1], words[0], *words[2:]])}")
    if problems:
        raise BadInput(problems)
    return Command(words[0], words[1], words[2:], "--dry-run" in argv)


def without_effect(overrides: Sequence[str], module: str) -> list[str]:
    """A note for each override of a stack that `module` (recipes.gpt.megatron.pretrain) does not start."""
    recipe, stack, name = module.rsplit(".", 2)
    notes = []
    for override in overrides:
        other = override.partition(".")[0]
        if other in STACKS and other != stack:
            script = f"{recipe.replace('.', '/')}/{other}/{name}.sh"
            hint = f"; start {script}" if find(script).is_file() else ""
            notes.append(f"{shortened(override)} has no effect on {stack}{hint}")
    return notes


def require_memory(run: "Run", nproc: int) -> None:
    """BadInput if the processes of this node, which has no GPU, need more memory than it has, by the estimate for GPUs: the
    kernel would kill one of them, or another user's."""
    from common.planning import memory

    try:
        estimate = memory.estimate_for(run.cfg, run.cfg.model, run.stack, run.layout.world)
    except BadInput:  # of a layout whose memory is not estimated
        return
    needed = nproc * (estimate["required"] + estimate.get("host", 0))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        ranks = f"{nproc} process{'es' * (nproc > 1)}"
        raise BadInput(
            f"{ranks} on a machine without a GPU would need about {needed / 2**30:,.0f} GiB of memory, and it has "
            f"{there / 2**30:,.0f} GiB: give a smaller model or micro batch, or find GPUs for it with python -m scripts.plan"
        )


def nodes(environ: Mapping[str, str]) -> Nodes:
    """Processes and nodes from the environment. BadInput names every variable with a wrong value."""
    problems: list[str] = []
    env = _from_slurm(environ, problems) | {name: value for name, value in environ.items() if value.strip()}

    def number(name: str, default: int, least: int, most: int = 2**20) -> int:
        text = env.get(name, "").strip()
        if not text:
            return default
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
            upper = f" to {most}" if most < 2**20 else ""
            problems.append(f"{name}={text}: must be a whole number from {least}{upper}")
            return default
        return int(text)

    nproc = number("NPROC", 0, 1) or max(1, visible_gpus(environ))
    asked, least = env.get("NNODES", ""), 0
    if ":" in asked:
        least, most = _range(asked, env, problems)
        env["NNODES"] = str(most)
    nnodes = number("NNODES", 1, 1)
    elastic = (least, number("MAX_RESTARTS", RESTARTS, 0), number("REGROUP_SECONDS", REGROUP_SECONDS, 1)) if least else ()
    for name in ("MAX_RESTARTS", "REGROUP_SECONDS"):
        if name in env and ":" not in asked:
            problems.append(f"{name}={env[name]} needs an elastic run: NNODES=MIN:MAX, for example NNODES=1:{max(2, nnodes)}")
    rank = number("NODE_RANK", 0, 0)
    port = number("MASTER_PORT", 0, 1, 65535) or None
    if nnodes == 1:
        if rank:
            problems.append(f"NODE_RANK={rank} and NNODES is 1; set NNODES to the number of nodes")
        if problems:
            raise BadInput(problems)
        return Nodes(nproc, 1, 0, None, port, *elastic)

    address = env.get("MASTER_ADDR")
    if "NODE_RANK" not in env:
        problems.append(f"NNODES={nnodes} needs NODE_RANK: 0 on the node of MASTER_ADDR, up to {nnodes - 1}")
    elif rank >= nnodes:
        problems.append(f"NODE_RANK={rank}: must be below NNODES={nnodes}; the first node is 0")
    if not address:
        problems.append(f"NNODES={nnodes} needs MASTER_ADDR: the address of node 0 as the others reach it")
    else:
        try:
            socket.getaddrinfo(address, None)
        except (OSError, ValueError):  # ValueError: a name of 300 characters, for example
            problems.append(f"MASTER_ADDR={address}: no such host; give a name or address that this node can reach")
    if problems:
        raise BadInput(problems)
    return Nodes(nproc, nnodes, rank, address, port or DEFAULT_PORT, *elastic)


def _range(text: str, env: Mapping[str, str], problems: list[str]) -> tuple[int, int]:
    """(1, 4) for NNODES=1:4. Adds to `problems`, then (1, 1)."""
    match = re.fullmatch(r"([1-9]\d{0,5}):([1-9]\d{0,5})", text.strip())
    if not match:
        problems.append(f"NNODES={shortened(text)}: must be a whole number from 1, or MIN:MAX of two, for example 1:4")
    elif int(match[1]) > int(match[2]):
        problems.append(f"NNODES={text}: MIN must not be above MAX; give NNODES={match[2]}:{match[1]}")
    elif "SLURM_STEP_ID" in env:
        problems.append(
            f"NNODES={text} under srun: SLURM ends a step that loses a node; leave NNODES out (scripts/slurm.sh queues the job "
            "again, and the same command continues)"
        )
    else:
        return int(match[1]), int(match[2])
    return 1, 1


def _from_slurm(env: Mapping[str, str], problems: list[str]) -> dict[str, str]:
    """NNODES and so on for a task of srun. A batch script without srun is one node."""
    if "SLURM_STEP_ID" not in env or "NNODES" in env:
        return {}
    count = env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES", "1")
    tasks = env.get("SLURM_STEP_NUM_TASKS", count)
    if tasks != count:
        problems.append(f"srun started {tasks} tasks on {count} nodes; give srun --ntasks-per-node=1 (and NPROC)")
    if count == "1":
        return {}
    return {
        "NNODES": count,
        "NODE_RANK": env.get("SLURM_NODEID", ""),
        "MASTER_ADDR": first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")),
        # two jobs that share a node get different ports
        "MASTER_PORT": str(20000 + int(re.sub("[^0-9]", "", env.get("SLURM_JOB_ID", ""))[-4:] or 0)),
    }


def first_host(nodelist: str) -> str:
    """'gpu[007-009,12],login1' -> 'gpu007'"""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodelist)
    return "".join(part or "" for part in match.groups()) if match else ""


def visible_gpus(env: Mapping[str, str]) -> int:
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        ids = [v.strip() for v in visible.split(",")]
        return next((i for i, v in enumerate(ids) if v in ("", "-1")), len(ids))  # CUDA stops at the first that is none
    devices = [d for d in glob.glob("/dev/nvidia*") if re.fullmatch(r"/dev/nvidia\d+", d)]
    if devices or not shutil.which("nvidia-smi"):
        return len(devices)
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout  # WSL has no /dev/nvidia*
    return sum(line.startswith("GPU ") for line in listed.splitlines())


# ---- the command and its environment


def torchrun(on: Nodes) -> list[str]:
    """torchrun's options. Several nodes: static rendezvous, which needs no node to recognize itself as MASTER_ADDR; elastic
    ones: that of c10d, which node 0 holds."""
    options = [f"--nproc-per-node={on.nproc}"]
    if on.is_elastic:
        options.append(f"--max-restarts={on.restarts}")
    if on.is_elastic and on.nnodes > 1:
        # more nodes than the batch divides among are spares: torchrun lets them wait until one is lost
        least, most = min(on.worlds, default=on.least) // on.nproc, max(on.worlds, default=on.world) // on.nproc
        is_host = str(on.node_rank == 0).lower()
        return options + [
            f"--nnodes={least}:{most}",
            "--rdzv-id=twinstack",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={on.master_addr}:{on.master_port}",
            f"--rdzv-conf=is_host={is_host},last_call_timeout={on.regroup_seconds}",
            f"--local-addr={local_address(on.master_addr or '')}",
        ]
    if on.master_addr is not None:
        return options + [
            f"--nnodes={on.nnodes}",
            f"--node-rank={on.node_rank}",
            f"--master-addr={on.master_addr}",
            f"--master-port={on.master_port}",
            f"--local-addr={local_address(on.master_addr)}",
        ]
    if on.master_port is not None and not on.is_elastic:
        return options + ["--master-addr=127.0.0.1", f"--master-port={on.master_port}"]
    return options + ["--standalone", "--local-addr=127.0.0.1"]  # any free port


def free_port(on: Nodes) -> Nodes:
    """`on` with a port that is free. If MASTER_PORT is in use, a single node takes another port, with a note. BadInput for
    several nodes, because they must use the same port."""
    if on.master_port is None or on.node_rank != 0 or not port_in_use(on.master_port):
        return on
    if on.nnodes > 1:
        raise BadInput(f"MASTER_PORT={on.master_port} is in use on this node; give all {on.nnodes} nodes another one")
    print(f"note: MASTER_PORT={on.master_port} is in use; taking a free one", file=sys.stderr)
    return on._replace(master_port=None)


def port_in_use(port: int) -> bool:
    with socket.socket() as probe:
        # as torch's store does: connections that linger after their process do not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def local_address(master_addr: str) -> str:
    """The address of this node as MASTER_ADDR sees it. Node 0's own name is often 127.0.1.1: then that of its default route."""
    address = _route_to(master_addr)
    is_local = master_addr == "localhost" or master_addr.startswith("127.")
    if address.startswith("127.") and not is_local:
        with contextlib.suppress(OSError):
            return _route_to("192.0.2.1")  # an address for documentation: stands for any other network
    return address


def _route_to(host: str) -> str:
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # UDP: chooses the route, sends nothing
        return str(probe.getsockname()[0])


def interface(address: str) -> str | None:
    import psutil

    names = (name for name, addresses in psutil.net_if_addrs().items() if address in [a.address for a in addresses])
    return next(names, None)


def environment(on: Nodes, scratch: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the ranks. Variables that the user has set keep their values."""
    defaults = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(max(1, cores() // on.nproc))}
    defaults["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # else a node that ends fills the screens of the others with torch's warnings
    # On a CPU glibc returns the memory of a large tensor to the kernel and gets it again page by page: a tenth of the time of
    # a small BERT's step. With these it keeps up to so many bytes (man 3 mallopt, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD).
    defaults |= dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(4 << 30))
    if on.master_addr is not None:
        name = interface(local_address(on.master_addr))
        if name:
            defaults |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}  # =: this name, not a prefix
    always = {heartbeat.SCRATCH: str(scratch), "TWINSTACK_EXIT_CODE": str(scratch / "exit_code"), "PET_LOG_DIR": str(scratch)}
    return defaults | dict(environ) | always


def with_worlds(on: Nodes, run: "Run") -> Nodes:
    """`on` with the numbers of ranks with which an elastic run can go on, which are noted."""
    from common.config import views
    from common.layout import fitting

    worlds = fitting(views(run.whole), run.stack, on.possible_worlds)
    run.notes.append(f"NNODES={on.least}:{on.nnodes}: train.global_batch divides among {elastic.listed(worlds)}")
    return on._replace(worlds=tuple(worlds))


def variables_of(run: "Run", on: Nodes) -> dict[str, str]:
    """What CUDA, NCCL and the agent read when a process starts, before it reads the config of this run."""
    variables = elastic.variables(settings_of(on, run.out)) if on.is_elastic else {}
    ring = run.layout.cp > 1 and run.cfg.megatron.transformer_engine  # sends keys and values beside its attention
    if run.stack == "megatron" and (run.layout.tp > 1 or ring):
        # one queue: kernels begin in the order of their launch, the all-reduce of a layer's input gradient before the GEMM that
        # it overlaps with (Megatron-LM, megatron/training/arguments.py); elsewhere it would only hold copies up
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if run.cfg.train.deterministic:
        variables["NCCL_ALGO"] = processes.NCCL_ALGO
    return variables


def settings_of(on: Nodes, out: Path) -> elastic.Settings:
    return elastic.Settings(str(out), on.node_rank, list(on.worlds), f"{on.least}:{on.nnodes}")


@contextlib.contextmanager
def swap_folder(run: "Run") -> Iterator[dict[str, str]]:
    """The variable that names this launch's own folder in deepspeed.nvme."""
    place = run.cfg.deepspeed.nvme if run.stack == "deepspeed" else None
    if place is None:
        yield {}
        return
    with lock.scratch_folder(find(place)) as folder:
        yield {heartbeat.SWAP_FOLDER: folder}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- running


class Stop:
    """Passes signals that ask for a stop on to the ranks, past torchrun, which would kill them after 30 s."""

    first_signal = 0  # the first signal that this process got, in whichever phase

    def __init__(self, agent: subprocess.Popen[bytes], scratch: Path):
        self.agent, self.scratch = agent, scratch
        self.signal = 0  # the first signal since then
        self.killed = False  # the ranks were killed, since there was nothing to save
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self)

    def __call__(self, number: int, _frame: object) -> None:
        again, self.signal = bool(self.signal), self.signal or number
        Stop.first_signal = Stop.first_signal or number
        if again:
            if number == signal.SIGINT and not (self.scratch / "exit_code").exists():  # which the ranks write when they end
                print(f"still saving; to end at once without it: kill -9 {os.getpid()}", file=sys.stderr, flush=True)
            return
        import psutil

        (self.scratch / elastic.STOP).touch()
        try:
            ranks = psutil.Process(self.agent.pid).children()
        except psutil.NoSuchProcess:
            return
        # A rank that does not handle the signal yet has trained nothing, so no rank has: each step needs all of them.
        self.killed = not ranks or not all(_catches_sigterm(r.pid) for r in ranks)
        name = signal.Signals(number).name
        if self.killed:
            text = f"{name}: stopped before the first step; the same command begins again"
        else:
            text = f"{name}: stops after this step and saves its state"
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())  # print could be called while it is printing
        if self.killed:
            ranks = [psutil.Process(self.agent.pid), *ranks]
        for process in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if self.killed else signal.SIGTERM)


def _catches_sigterm(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return not Path("/proc/self/status").exists()  # the process has ended; or not Linux: taken to be ready
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.M)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def _end_with_launcher() -> None:
    """Linux: kill -9 of the launcher also kills torchrun (prctl PR_SET_PDEATHSIG), whose end kills the ranks the same way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))


def run_ranks(
    arguments: Sequence[str], on: Nodes, out: Path | None = None, hang_seconds: int = 0, variables: Mapping[str, str] = {}
) -> int:
    """Run torchrun with these arguments and return the exit code of the launch.

    variables: of the ranks' environment, where the user has not set them.
    hang_seconds: seconds without progress after which everything is ended; 0: never. Details of a failure go to a file in OUT.
    """
    with lock.scratch_folder() as folder:
        scratch = Path(folder)
        watch = Watch(scratch, on, out, hang_seconds)
        agent = subprocess.Popen(
            [sys.executable, "-m", "common.launch.agent", *arguments],
            env=environment(on, scratch, {**variables, **os.environ}) | {"TWINSTACK_HANG_SECONDS": str(hang_seconds)},
            start_new_session=True,  # Ctrl-C is for the launcher alone
            preexec_fn=_end_with_launcher,
        )
        stop = Stop(agent, scratch)
        failure: Failure | None = None
        ended = _wait(agent, watch.tick)
        while ended is None and failure is None:
            failure = watch.check()
            if failure and failure.code == EXIT_HANG and on.is_elastic:  # its ranks alone: the agent starts them again
                _end_round(agent, watch, failure)
                failure = None
            ended = None if failure else _wait(agent, watch.tick)
        lines: list[str] = []
        if failure:
            code = failure.code
        else:
            assert ended is not None
            reported, *lines = _read(scratch / "exit_code").splitlines() or ["0"]
            code = exit_code(ended, int(reported), stop)
            if code not in (0, int(reported), 128 + stop.signal):  # else the ranks have printed the reason
                failure = watch.failure(ended)
                code = failure.code if failure else code
        for line in failure.lines if failure and failure is not watch.hung else ():
            print(error_line(line) if line.startswith("error: ") else line, file=sys.stderr, flush=True)
        if ended is None:
            _kill(agent)
        elif failure is None and code == EXIT_BAD_INPUT:  # perhaps on this node alone, which has printed it
            failure = Failure(code, lines)
        is_told = failure is not None and ended is not None and code == EXIT_BAD_INPUT
        details = watch.close(failure, code)
        if details:
            print(details, file=sys.stderr, flush=True)
        if failure and not is_told:
            if out is not None and code != EXIT_BAD_INPUT:
                print(_continues(out), file=sys.stderr, flush=True)
            is_shown = failure is not watch.hung  # just above, and not at the end of an earlier round
            print(error_line(failure.last_words(is_shown)), file=sys.stderr, flush=True)
        return code


def _continues(out: Path) -> str:
    """What the same command does after a failure. Ranks that are killed save nothing."""
    try:
        newest = checkpoint.latest(out)
    except (BadInput, OSError) as error:
        return f"the checkpoints cannot be read: {error}"
    if newest is None or not newest.step:
        return "no step was saved; the same command begins again"
    return f"saved up to step {newest.step:,}; the same command continues from there"


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def _end_round(agent: subprocess.Popen[bytes], watch: Watch, failure: Failure) -> None:
    """Kill the ranks of a round of an elastic run, stopped ones too."""
    import psutil

    print("\n".join(failure.lines), file=sys.stderr, flush=True)
    watch.end_round(failure)
    with contextlib.suppress(psutil.NoSuchProcess):
        for rank in psutil.Process(agent.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()


def _kill(agent: subprocess.Popen[bytes]) -> None:
    """Kill torchrun and its ranks, stopped ones too."""
    import psutil

    try:
        processes = psutil.Process(agent.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        processes = []
    agent.kill()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    agent.wait()
    psutil.wait_procs(processes, timeout=5)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def exit_code(agent: int, reported: int, stop: Stop) -> int:
    """The exit code of a launch. agent: torchrun's return code; reported: what the ranks have reported, 0 if nothing."""
    saved = reported in (EXIT_SIGTERM, EXIT_SIGINT) and agent in (0, reported)  # else a rank failed while it saved
    if stop.signal and (stop.killed or saved):
        return 128 + stop.signal
    if reported and (saved or reported not in (EXIT_SIGTERM, EXIT_SIGINT)):
        return reported
    return agent if agent >= 0 else 128 - agent


def _steps_missing(run: "Run") -> bool:
    """Whether the run has not come to its last step: a spare node ends with code 0 however the others end."""
    newest = checkpoint.latest(run.out)
    return newest is None or newest.step < run.whole.last_step


def main(argv: Sequence[str] | None = None) -> int:
    """The command: check, then start the ranks, phase by phase; returns the exit code."""
    module, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if module.count(".") < 2:
        raise BadInput("this is started by the launch scripts; type bash recipes/FAMILY/STACK/pretrain.sh --help")
    recipe, stack, name = module.rsplit(".", 2)  # recipes.gpt, megatron, pretrain
    if {"-h", "--help"} & set(rest):
        script = module.replace(".", "/") + ".sh"
        example = f"{recipe.replace('.', '/')}/configs/{EXAMPLES[name]}.yaml"
        codes = EXIT_CODES.replace("\n", "\n" + " " * 11)
        print(USAGE.format(
            script=script, example=example, exit_codes=codes, restarts=RESTARTS, regroup=REGROUP_SECONDS
        ))  # fmt: skip
        return 0
    task = importlib.import_module(f"{recipe}.{TASKS.get(name, name)}")
    if "--help-config" in rest:
        from common import config_help

        section = next((word for word in rest[rest.index("--help-config") + 1 :] if not word.startswith("-")), None)
        print(config_help.text(task.Config, section))
        return 0
    command = parse(rest, f"bash {module.replace('.', '/')}.sh")
    if stack not in STACKS:
        raise BadInput(f"{module}: the folder must be one of {', '.join(STACKS)}, is {stack}")
    on = nodes(os.environ)

    from common.checkpoints.run_record import finished, record_finished
    from common.launch.dry_run import describe
    from common.preflight import prepare

    def prepared() -> "Run":
        return prepare(
            command.config, command.out, command.overrides, stack, task, on.world, command.dry_run, on.possible_worlds
        )

    begin = time.time()
    run = prepared()
    run.notes.extend(without_effect(command.overrides, module))
    if not command.dry_run and not visible_gpus(os.environ):
        require_memory(run, on.nproc)
    if on.is_elastic:
        on = with_worlds(on, run)
    on = free_port(on)
    arguments = [*torchrun(on), "-m", module, command.config, command.out, *command.overrides]
    if command.dry_run:
        print(describe(run, task, ["torchrun", *arguments]))
        return 0
    if (message := finished(run)) is not None:
        print(message)
        return 0
    outlive_readers()
    for note in run.notes:
        print(error_line(f"note: {note}", "cyan"), file=sys.stderr, flush=True)

    def started(run: "Run") -> int:
        _announce(run, on)
        variables = variables_of(run, on) | {
            startup.LAUNCHED: "0" if on.is_elastic else str(begin), startup.HEADER: str(run.layout.world)
        }  # fmt: skip
        with swap_folder(run) as swap:
            return run_ranks(arguments, on, run.out, run.cfg.train.hang_seconds, variables | swap)

    with lock.locked(run.out) if on.node_rank == 0 else contextlib.nullcontext():
        code = started(run)
        while code == 0 and not run.is_last_phase:  # each phase continues from the checkpoint of the one before
            before, run = run, prepared()
            if Stop.first_signal:  # the signal came after the end of the phase before
                print("stopped between two phases, state saved; the same command continues", file=sys.stderr, flush=True)
                return 128 + Stop.first_signal
            if run.cfg.train.steps == before.cfg.train.steps:
                raise BadInput(f"{run.out}: step {before.cfg.train.steps} was not saved there, so the next phase cannot begin")
            code = started(run)
        if code == 0 and on.node_rank == 0 and not (on.is_elastic and _steps_missing(run)):
            record_finished(run)
            if run.resume is None or run.resume.step < run.whole.last_step:  # else that is all it says
                print(closing(run, time.time() - begin), flush=True)
    return code


def _announce(run: "Run", on: Nodes) -> None:
    """Say what is started: on node 0 what the run is, on the others where to look."""
    from common.training import log

    ranks = f"{on.nproc} process{'es' * (on.nproc > 1)}"
    if on.node_rank:
        text = f"{ranks} of the run; node 0 ({on.master_addr}) prints its progress, and this node its own errors"
        print(field(f"node {on.node_rank}", f"{text}. Files: {run.out}"), flush=True)
        return
    where = f" on each of {on.nnodes} nodes" if on.nnodes > 1 else ""
    print(log.header(run), flush=True)
    print(field("start", f"{ranks}{where}: importing torch and {run.stack}, which takes seconds"), flush=True)


def closing(run: "Run", seconds: float) -> str:
    """The last lines of a run: its losses, where its files are, and what to type next."""
    from common.training import log

    out = run.out
    last: dict[str, Any] = {}
    for line in log.read(out / "metrics.jsonl", run.whole.last_step):
        last |= {key: value for key, value in line.items() if key in ("step", "loss", "valid_loss")}
    losses = [f"{name} {last[key]:.4f}" for key, name in (("loss", "loss"), ("valid_loss", "validation loss")) if key in last]
    files = "metrics.jsonl train.csv valid.csv tensorboard wandb hf adapter best eval.json predictions".split()
    steps = checkpoint.finished(out)
    present = [name for name in files if (out / name).exists()] + [steps[-1].name for _ in steps[:1]]
    lines = [
        field("done", ", ".join([f"{last.get('step', 0):,} steps", *losses, f"{duration(seconds)} in all"])),
        field("files", f"{out}/: {', '.join(present)}"),
    ]
    quickstart = run.whole.quickstart
    prompt = "TEXT"
    if quickstart and quickstart.prompt and str(run.whole.data.train) in [f"{path}/train" for path in quickstart.corpus_words]:
        prompt = quickstart.prompt  # for the text of the config, not for one's own
    is_pretraining = "task" not in type(run.whole).model_fields
    generate = f"python -m scripts.generate {shlex.quote(f'{out}/hf')} --prompt {shlex.quote(prompt)}"
    if len(generate) > WIDTH - 10:  # two lines that can be copied together
        generate = generate.replace(" --prompt", f" \\\n{'':14}--prompt")
    following = [generate] if is_pretraining else []
    following += [f"python -m scripts.check {shlex.quote(str(out))}"] if run.whole.expect else []
    following += [f"tensorboard --logdir {shlex.quote(f'{out}/tensorboard')}"]
    return "\n".join([*lines, *(f"{field('next' * (not i), '')}{command}" for i, command in enumerate(following))])
