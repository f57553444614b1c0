"""Run Python commands in children of one process that has imported the libraries, which takes 7 s of CPU time.

`run(["-m", "scripts.evaluate", ...])` gives what `subprocess.run([sys.executable, "-m", "scripts.evaluate", ...])` gives with
its output captured. With `nproc` the command runs once per rank, in the environment that torchrun gives to its ranks. Each
command gets a new child of a parent that has run nothing but imports, so no state passes from one to the next. The project's
own modules are imported in the child, from its working directory.
"""

import array
import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "accelerate", "deepspeed", "megatron.core.distributed", "megatron.core.models.bert.bert_model",
    "megatron.core.models.gpt.gpt_model", "megatron.core.models.T5.t5_model", "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules", "peft", "psutil", "pydantic", "rich.progress", "safetensors.torch",
    "torch.distributed", "torch.utils.tensorboard", "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama", "transformers.models.megatron_bert.modeling_megatron_bert",
    "transformers.models.t5.modeling_t5", "yaml",
)  # fmt: skip
# What the libraries read when they are imported
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_LOG_LEVEL": "error",
    "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
LOST = -1  # exit code of a command whose process group was killed from outside


# ---- in the tests


def run(
    arguments: Sequence[object],
    nproc: int = 0,
    cwd: Path = ROOT,
    env: Mapping[str, str] = MappingProxyType({}),
    merged: bool = False,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """`arguments` are those of Python: ["-m", MODULE, ...], ["-c", CODE, ...] or [SCRIPT, ...]. env: beside the tests' own.
    merged: standard error goes to standard output."""
    words = [str(word) for word in arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)} | dict(env)
    request = {"arguments": words, "nproc": nproc, "cwd": str(cwd), "env": environment}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        code = _call(request, out, out if merged else err, timeout)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace").replace("\r\n", "\n"))
    return subprocess.CompletedProcess(words, code, *texts)


def _call(request: dict[str, Any], out: BinaryIO, err: BinaryIO, timeout: float) -> int:
    connection, remote = socket.socketpair()
    with connection:
        with remote:
            files = array.array("i", [out.fileno(), err.fileno(), remote.fileno()])
            _server().sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        connection.settimeout(timeout)
        # If this process ends the wait (a test's timeout), `connection` is closed, and the command's leader ends the command.
        answer = connection.recv(64)
    return int(answer) if answer else LOST


@functools.cache
def _server() -> socket.socket:
    connection, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).resolve()), str(remote.fileno())],
        env=environment | ENVIRONMENT, pass_fds=[remote.fileno()], start_new_session=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    remote.close()
    atexit.register(process.wait)
    atexit.register(connection.close)  # ends it
    return connection


# ---- in the server


def serve(connection: socket.socket) -> NoReturn:
    with warnings.catch_warnings(action="ignore"):
        for name in LIBRARIES:
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the leaders
    while True:
        message, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            connection.close()
            _lead(json.loads(message), *files)
        for file in files:
            os.close(file)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def _lead(request: dict[str, Any], out: int, err: int, answer: int) -> NoReturn:
    """Start the processes of one command, wait for them, and answer with its exit code. The first failure ends the others."""
    _die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nproc = request["nproc"]
    listener = socket.create_server(("127.0.0.1", 0)) if nproc else None
    running = set()
    for rank in range(nproc or 1):
        pid = os.fork()
        if pid == 0:
            os.close(answer)
            if listener:
                request["env"] |= _environment(rank, nproc, listener.getsockname()[1])
                listener.close()
            _execute(request, out, err)
        running.add(pid)
    if listener:
        import torch.distributed as dist

        _store = dist.TCPStore(  # in none of the ranks, as with torchrun: the end of one does not break it
            "127.0.0.1", listener.getsockname()[1], is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    threading.Thread(target=_end_with_caller, args=(answer, running), daemon=True).start()
    code = 0
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if not code and (code := os.waitstatus_to_exitcode(status)):
            for other in running:
                os.kill(other, signal.SIGKILL)
    os.write(answer, str(code).encode())
    os._exit(0)


def _end_with_caller(answer: int, running: set[int]) -> None:
    if not os.read(answer, 1):
        for pid in list(running):
            os.kill(pid, signal.SIGKILL)
        os._exit(1)


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank of one node."""
    same = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_RUN_ID": "none"}
    return {name: str(value) for name, value in ({"RANK": rank, "LOCAL_RANK": rank} | same | agent).items()}


def _execute(request: dict[str, Any], out: int, err: int) -> NoReturn:
    """The command in this process, to its end."""
    _die_with_parent()
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    code: object = 0
    try:
        if request["arguments"][0] == "-m":
            sys.path[:0] = [request["cwd"], *paths]
            sys.argv = request["arguments"][1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        elif request["arguments"][0] == "-c":
            sys.path[:0] = [request["cwd"], *paths]
            _, text, *rest = request["arguments"]
            sys.argv = ["-c", *rest]
            exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = request["arguments"]
            sys.path[:0] = [str(Path(sys.argv[0]).resolve().parent), *paths]
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter ends: threads, then what was registered
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
