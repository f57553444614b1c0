"""OUT/run.json: what a run was made of (data, versions, commit), written at its start, and what its end has written."""

import datetime
import os
import platform
import shutil
import subprocess
import uuid
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import config
from common.checkpoints import checkpoint, integrity
from common.config import Config
from common.errors import BadInput
from common.json_files import read_object, write_json
from common.launch import lock
from common.paths import ROOT, find

if TYPE_CHECKING:
    from common.contract import Dataset, Family
    from common.preflight import Run

CODE = ("common", "data", "recipes", "scripts")  # folders of the code that a run may execute
PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "accelerate")
NO_LONGER_READ = (
    "hang_seconds",
    "save_every",
    "keep",
    "log_every",
    "deterministic",
)  # by a finished run, of the section `train`
FASTER = ("transformer-engine", "apex", "flash-attn")  # the stacks call their kernels where they are installed
LEFTOVERS = (
    *("step_*.tmp", "step_*.old.tmp", "hf.tmp", "hf.old.tmp", "adapter.tmp", "adapter.old.tmp"),
    *("tokenizer.tmp", "tokenizer.old.tmp", "config.yaml.tmp", "run.json.part", "eval.json.part", "metrics.jsonl.part"),
    *("best/step_*.tmp", "best/step_*.old.tmp"),
)


def new(
    config_path: str, stack: str, task: "Family", cfg: Config, train: "Dataset | None", valid: "Dataset | None",
    tokenizer_hash: str | None,
) -> dict[str, Any]:  # fmt: skip
    """The record of a run that is about to start; `begin` adds its id and its stacks."""
    return {
        "config": Path(config_path).stem, "family": task.FAMILY, "stack": stack,
        "data": {"train": train.content_hash if train else None, "valid": valid.content_hash if valid else None},
        "tokenizer": tokenizer_hash, "commit": commit(), "versions": versions(),
        "init": _start_of(cfg),
    }  # fmt: skip


def _start_of(cfg: Config) -> dict[str, Any] | None:
    """The run and step whose export init.from is: {"id", "step"}; None for any other beginning."""
    export = None if cfg.init.from_ == "scratch" else read_object(find(cfg.init.from_) / integrity.RECORD)
    return {"id": export["id"], "step": export.get("step")} if export and "id" in export else None


def versions() -> dict[str, str | None]:
    """The installed version of each package that computes; None if it is not installed. Imports none of them."""
    return {package: version(package) for package in (*PACKAGES, *FASTER)}


def gpu() -> dict[str, Any] | None:
    """The GPU of this process, its driver, and the libraries that torch was built with; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return {
        "name": torch.cuda.get_device_name(), "memory_bytes": torch.cuda.get_device_properties().total_memory,
        "driver": _driver(), "cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def hardware() -> str:
    """Of this machine: its GPUs, else its cores and their processor."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}, no GPU"


def threads() -> int:
    """Of this process, in the operators of torch."""
    import torch

    return torch.get_num_threads()


def _driver() -> str | None:
    """The version of NVIDIA's driver, such as 580.95.05."""
    module = Path("/sys/module/nvidia/version")
    if module.is_file():
        return module.read_text(encoding="utf-8").strip()
    if not shutil.which("nvidia-smi"):  # WSL has it, and no such file
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0].strip() or None


def version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of this repository, with '+changes' if tracked files differ from it or code is untracked, as a copied recipe
    is at first; 'unknown' without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    try:
        untracked = ("ls-files", "--others", "--exclude-standard", "--directory", "--", *CODE)
        changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") or git(*untracked) else ""
        return git("rev-parse", "--short=12", "HEAD") + changed or "unknown"
    except OSError:
        return "unknown"


def begin(run: "Run") -> None:
    """On rank 0, once nothing can refuse the run any more: write its config, tokenizer and record to OUT, each whole or not at
    all, and remove what a killed run has left half written. BadInput if another run writes there."""
    from common.data import tokenizer as tokenizers

    if "TWINSTACK_EXIT_CODE" not in os.environ:  # else the launcher holds the lock
        lock.hold(run.out)
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(run.out)
        config.write_yaml(run.whole, run.out / "config.yaml")
        if run.tokenizer is not None:
            part = run.out / "tokenizer.tmp"
            tokenizers.load(run.tokenizer).save(part)
            integrity.replace_folder(part, run.out / "tokenizer")
        recorded = read_object(run.out / "run.json") or {}
        identifier = recorded.get("id")
        # for life: the export and every run that begins from it name the run
        run.record["id"] = identifier if isinstance(identifier, str) and identifier else uuid.uuid4().hex
        if recorded:
            run.record["init"] = recorded.get("init")  # where it began, whatever init.from holds since
        run.record.update(gpu=gpu(), world=run.layout.world, threads=threads())
        run.record.update(hardware=hardware(), date=datetime.date.today().isoformat())  # of this start, not of the first
        before = recorded.get("stacks")
        before = before if isinstance(before, list) else []
        stacks = [*before, run.stack] if before[-1:] != [run.stack] else before
        write_json(run.out / "run.json", run.record | {"stacks": stacks})
    except OSError as error:
        raise BadInput(f"{run.out}: {error.strerror}; choose another OUT") from None


def _remove_leftovers(out: Path) -> None:
    """Remove what a killed process was writing under a temporary name. The lock is held: no other process writes these."""
    for path in (path for pattern in LEFTOVERS for path in out.glob(pattern)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def finished(run: "Run") -> str | None:
    """One line if OUT holds this run whole, with all that its end writes: nothing is left to do. Else None."""
    record = (read_object(run.out / "run.json") or {}).get("finished")
    if not run.resume or not isinstance(record, dict) or record.get("step") != run.resume.step:
        return None
    files = record.get("files")
    if not isinstance(files, list) or not all(isinstance(name, str) and (run.out / name).is_file() for name in files):
        return None
    try:
        recorded = config.recorded(run.out / "config.yaml", type(run.whole))
    except (BadInput, ValueError):
        return None
    export = run.out / "hf"
    if export.is_dir() and integrity.exported_step(export) is None:
        return None
    same = _without_systems(recorded) == _without_systems(run.whole)
    where = f"; its export is {export}" if export.is_dir() else ""
    return f"complete: {run.out} is at its last step, {run.resume.step:,}{where}" if same else None


def _without_systems(cfg: Config) -> dict[str, Any]:
    """The values of a config without those that a finished run no longer looks at: layouts, and how often it saves."""
    values = cfg.dump()
    rest = {key: value for key, value in values.items() if key not in (*config.STACKS, "expect", "log")}
    return rest | {"train": {k: v for k, v in rest["train"].items() if k not in NO_LONGER_READ}}


def record_finished(run: "Run") -> None:
    """In the launcher, once all ranks have ended well: record the last step and the files that the end of a run writes."""
    last, record = checkpoint.latest(run.out), read_object(run.out / "run.json")
    if last is None or record is None:
        return
    written = [*run.out.glob("hf/config.json"), *run.out.glob("adapter/adapter_config.json"), *run.out.glob("eval.json")]
    written += [path for path in run.out.glob("predictions/*") if path.is_file()]
    files = sorted(path.relative_to(run.out).as_posix() for path in written)
    write_json(run.out / "run.json", record | {"finished": {"step": last.step, "files": files}})
    if run.resume and run.resume.step == last.step:  # no step was made: a run of an older version, or its export was lost
        message = finished(run)
        if message:
            print(message, flush=True)
