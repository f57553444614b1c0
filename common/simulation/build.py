"""Builds the null GPU for the installed torch, once: g++, and nm to see which functions torch imports."""

import fcntl
import hashlib
import os
import platform
import runpy
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

from common.errors import BadInput

SOURCE = Path(__file__).with_name("null_gpu.cpp")
CUDA_MAJORS = (12, 13)  # the layouts of NVIDIA's structs that null_gpu.cpp knows
LIBRARY = "libcuda.so.1"  # also its soname: torch opens the driver under this name, and finds the library that is loaded
# NVML, which the allocator asks about NVLink before its segments grow: every call succeeds, but there is no fabric (3: not
# supported, nvml.h). Found under its soname too.
NVML = "libnvidia-ml.so.1"
NVML_CALLS = {
    "nvmlInit_v2": 0, "nvmlSystemGetCudaDriverVersion_v2": 0, "nvmlDeviceGetHandleByPciBusId_v2": 0,
    "nvmlDeviceGetNvLinkRemoteDeviceType": 0, "nvmlDeviceGetNvLinkRemotePciInfo_v2": 0,
    "nvmlDeviceGetComputeRunningProcesses": 0, "nvmlDeviceGetGpuFabricInfoV": 3,
}  # fmt: skip
# What torch imports is looked up in these; the driver's functions are wanted by libcaffe2_nvrtc.so
IMPORTERS = (
    "libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so", "libtorch_nvshmem.so",
    "libcaffe2_nvrtc.so",
)  # fmt: skip
PREFIXES = ("cuda", "__cuda", "cublas", "nccl", "cu")
NOT_OURS = ("cufft", "cuFile", "cusparse", "cusolver", "curand", "cudnn", "cupti", "cudss")  # libraries that stay as they are


class CannotSimulate(BadInput):
    """There is no null GPU on this machine; the line says why."""


def preload() -> str:
    """The value of LD_PRELOAD. The libraries are built if they are not there yet. CannotSimulate where they cannot be."""
    folder = _folder()
    return f"{folder / NVML}:{folder / LIBRARY}"


def _folder() -> Path:
    torch, cuda = _torch()
    compiler, nm = shutil.which("g++"), shutil.which("nm")
    if compiler is None or nm is None:
        raise CannotSimulate("the null GPU needs g++ and nm, to be compiled once: apt install g++")
    recipe = SOURCE.read_bytes() + Path(__file__).read_bytes() + f"{torch} {cuda} {platform.machine()}".encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinstack"
    folder = cache / f"null_gpu_{torch}_{hashlib.sha256(recipe).hexdigest()[:12]}"
    if not (folder / LIBRARY).is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with open(cache / "null_gpu.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
                if not (folder / LIBRARY).is_file():
                    _build(folder, compiler, nm, cuda)
        except OSError as error:
            raise CannotSimulate(f"{cache}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written to") from None
    return folder


def _torch() -> tuple[str, int]:
    """Version of torch, and the CUDA version that it was built with (1000 x major + 10 x minor). Does not import torch."""
    if platform.system() != "Linux":
        raise CannotSimulate(f"the null GPU needs Linux, this is {platform.system()}")
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotSimulate("torch is not installed: bash scripts/setup.sh")
    values = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    torch, cuda = str(values["__version__"]), values.get("cuda")
    if not cuda:
        raise CannotSimulate(f"torch {torch} is built without CUDA; simulation needs the build with CUDA (no GPU)")
    major, minor = (int(part) for part in str(cuda).split(".")[:2])
    if major not in CUDA_MAJORS:
        known = " and ".join(map(str, CUDA_MAJORS))
        raise CannotSimulate(f"torch {torch} is built with CUDA {cuda}; the null GPU knows CUDA {known}")
    return torch, 1000 * major + 10 * minor


def _build(folder: Path, compiler: str, nm: str, cuda: int) -> None:
    """Compile into `folder`, which appears when it is whole."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None  # _torch has checked
    libraries = [path for name in IMPORTERS if (path := Path(spec.origin).with_name("lib") / name).is_file()]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        work = Path(scratch) / "build"
        work.mkdir()
        flags = ["-O1", "-std=c++17", "-fPIC", "-w", f"-DCUDA_VERSION={cuda}"]
        _run([compiler, *flags, "-c", str(SOURCE), "-o", str(work / "own.o")])
        own = _names(nm, ["--defined-only", str(work / "own.o")])
        wanted = _names(nm, ["-D", "--undefined-only", *map(str, libraries)])
        stubs = sorted(name for name in wanted - own if name.startswith(PREFIXES) and not name.startswith(NOT_OURS))
        text = "".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in [*stubs, "cuInit"])
        (work / "stubs.cpp").write_text(text, encoding="utf-8")
        link = ["-shared", f"-Wl,-soname,{LIBRARY}", "-o", str(work / LIBRARY), "-ldl"]
        _run([compiler, *flags, str(work / "own.o"), str(work / "stubs.cpp"), *link])
        calls = "".join(f'extern "C" int {name}() {{ return {code}; }}\n' for name, code in NVML_CALLS.items())
        (work / "nvml.cpp").write_text(calls, encoding="utf-8")
        _run([compiler, *flags, str(work / "nvml.cpp"), "-shared", f"-Wl,-soname,{NVML}", "-o", str(work / NVML)])
        shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed
        work.rename(folder)


def _names(nm: str, arguments: list[str]) -> set[str]:
    """Symbols as `nm` lists them, without the version after @."""
    lines = _run([nm, *arguments]).splitlines()
    return {words[-1].partition("@")[0] for line in lines if (words := line.split()) and not line.endswith(":")}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0][:200]
        raise CannotSimulate(f"the null GPU cannot be built: {Path(command[0]).name}: {reason}")
    return done.stdout
