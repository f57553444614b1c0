"""Before a run starts: its config, data, layout and OUT are checked together, torch-free, and every problem is reported.

The launch script does it on the host, where the error is the last thing on the screen; each rank does it again.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from common import checkpoint, config
from common.config import Config, Layout
from common.corpus import Stream
from common.errors import BadInput

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "accelerate")


class Run(NamedTuple):
    cfg: Config  # resolved: no default is left open
    stack: str
    out: Path
    layout: Layout
    train: Stream | None  # None in a dry run whose corpus is not there yet
    valid: Stream | None
    tokenizer: Path | None  # folder to export, if the corpus knows one
    facts: dict[str, Any]  # what run.json holds: hashes, versions, commit
    resume: checkpoint.Checkpoint | None
    notes: list[str]

    @property
    def tokens_per_step(self) -> int:
        return self.cfg.train.global_batch * self.cfg.data.seq_len

    def samples(self, step: int) -> range:
        """The numbers of the samples that make up optimizer step `step` (the first is 1)."""
        size = self.cfg.train.global_batch
        return range((step - 1) * size, step * size)


def prepare(
    config_path: str, out: str, overrides: Sequence[str], stack: str, task: ModuleType, world: int, dry_run: bool = False
) -> Run:
    """Check everything that can be checked before a process starts; BadInput carries all problems found.

    dry_run: a corpus that is not there is a note, not a problem.
    """
    cfg = config.load(config_path, overrides, task.Model)
    problems: list[str] = []
    train, valid, data_problems = _streams(cfg)
    folder, known = _tokenizer(cfg, train, valid, data_problems)
    notes = data_problems if dry_run else []
    if not dry_run:
        problems += data_problems

    out_path = Path(out)
    recorded = _recorded(out_path, problems)
    model = cfg.model.resolve(cfg, known.get("size"))
    decay = cfg.optim.decay_steps or recorded.get("optim", {}).get("decay_steps") or cfg.train.steps
    cfg = cfg.model_copy(update={"model": model, "optim": cfg.optim.model_copy(update={"decay_steps": decay})})
    problems += _vocabulary(cfg, train, valid, known)
    problems += _init(cfg, task)

    layout = None
    try:
        layout = config.layout(cfg, stack, world)
    except BadInput as error:
        problems += [f"{config_path}: {p}" for p in error.problems]

    facts = _facts(config_path, stack, task, train, valid, known)
    resume = None
    if recorded:
        problems += _same_run(cfg, recorded, facts, out_path)
    if not problems:
        resume = checkpoint.latest(out_path)
    if problems:
        raise BadInput(problems)
    return Run(cfg, stack, out_path, layout, train, valid, folder, facts, resume, notes)


def find(path: str) -> Path:
    """A path of a config: as it stands from here, else from the repository's root."""
    here = Path(path)
    return here if here.is_absolute() or here.exists() or here.with_suffix(".bin").exists() else ROOT / here


def _streams(cfg: Config) -> tuple[Stream | None, Stream | None, list[str]]:
    made: list[Stream | None] = []
    problems: list[str] = []
    for spec, shuffle in ((cfg.data.train, True), (cfg.data.valid, False)):
        try:
            made.append(None if spec is None else _stream(cfg, spec, shuffle))
        except BadInput as error:
            problems += error.problems
            made.append(None)
    return made[0], made[1], problems


def _stream(cfg: Config, spec: str | list, shuffle: bool) -> Stream:
    data = cfg.data
    stream = Stream(
        _found(spec), data.seq_len, pack=data.pack, seed=cfg.train.seed, shuffle=shuffle,
        eod_mask_loss=data.eod_mask_loss, reset_attention=data.reset_attention,
    )  # fmt: skip
    stream.verify()
    return stream


def _found(spec: str | list) -> str | list:
    if isinstance(spec, str):
        return str(find(spec))
    return [[e[0], str(find(e[1]))] if isinstance(e, list) else str(find(e)) for e in spec]


def _tokenizer(
    cfg: Config, train: Stream | None, valid: Stream | None, problems: list[str]
) -> tuple[Path | None, dict[str, Any]]:
    """The tokenizer's folder and {hash, size, eod_id}; corpora and config must agree on the hash."""
    corpora = [corpus for stream in (train, valid) if stream is not None for corpus in stream.corpora]
    hashes = {corpus.prefix: corpus.tokenizer_hash for corpus in corpora if corpus.tokenizer_hash}
    folder, known = None, {}
    if cfg.data.tokenizer:
        from common import tokenizer

        try:
            folder = find(cfg.data.tokenizer) if find(cfg.data.tokenizer).is_dir() else None
            loaded = tokenizer.load(folder or cfg.data.tokenizer)
            known = {"hash": loaded.hash, "size": loaded.size}
            hashes = {f"data.tokenizer={cfg.data.tokenizer}": loaded.hash} | hashes
        except BadInput as error:
            problems += error.problems
    elif train is not None and train.corpora[0].manifest:
        first = train.corpora[0]
        folder, known = first.tokenizer_dir, {"hash": first.tokenizer_hash, "size": first.manifest["tokenizer_size"]}
    if len(set(hashes.values())) > 1:
        told = ", ".join(f"{name} has {value[:12]}" for name, value in hashes.items())
        problems.append(f"the tokenizers differ ({told}); tokenize the corpora with one tokenizer (--tokenizer DIR)")
    return folder, known


def _vocabulary(cfg: Config, train: Stream | None, valid: Stream | None, known: dict[str, Any]) -> list[str]:
    size = cfg.model.vocab_size
    if size is None:
        return ["model.vocab_size: is missing, and no tokenizer is known to take it from; give model.vocab_size=N"]
    problems = []
    for name, stream in (("train", train), ("valid", valid)):
        largest = max((corpus.max_token_id for corpus in stream.corpora), default=0) if stream else 0
        if largest >= size:
            problems.append(
                f"data.{name}: holds token id {largest} and model.vocab_size={size}; "
                f"set model.vocab_size above it, or tokenize with a tokenizer of {size} ids"
            )
    if known.get("size", 0) > size:
        problems.append(f"model.vocab_size={size} is below the tokenizer's {known['size']} ids")
    return problems


def _init(cfg: Config, task: ModuleType) -> list[str]:
    """Is init.from a Hugging Face folder of this architecture (its config.json says so)?"""
    if cfg.init.from_ == "scratch":
        return []
    folder = find(cfg.init.from_)
    name = f"init.from={cfg.init.from_}"
    if not (folder / "config.json").is_file():
        return [f"{name}: no config.json there; give `scratch` or a Hugging Face folder"]
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if theirs.get("model_type") != cfg.model.arch:
        return [f"{name}: is a {theirs.get('model_type')!r} model, the config's model.arch is {cfg.model.arch!r}"]
    ours, problems = task.hf_shapes(cfg.model), []
    for key, value in ours.items():
        if key in theirs and theirs[key] is not None and theirs[key] != value:
            problems.append(f"{name}: has {key}={theirs[key]}, the config's model gives {value}")
    return problems


def _recorded(out: Path, problems: list[str]) -> dict[str, Any]:
    """The config of the run that OUT holds, {} if it holds none; problems if OUT cannot be used."""
    if (out / "config.yaml").is_file():
        return config.read_yaml(out / "config.yaml")
    if out.is_dir() and any(p.suffix != ".tmp" and p.name != "tensorboard" for p in out.iterdir()):
        problems.append(f"{out}: is not empty and holds no run (no config.yaml); choose another OUT")
    elif out.exists() and not out.is_dir():
        problems.append(f"{out}: is a file; choose another OUT")
    parent = next(p for p in [out, *out.absolute().parents] if p.exists())
    if parent.is_dir() and not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"{out}: not writable; choose another OUT")
    return {}


def _same_run(cfg: Config, recorded: dict[str, Any], facts: dict[str, Any], out: Path) -> list[str]:
    """A science key that differs from the run in OUT makes another run of it: name each."""
    other = type(cfg).model_validate(recorded)
    ours, theirs = config.science(cfg), config.science(other)
    problems = [
        f"{out} holds another run: {key} was {theirs.get(key)!r}, is {ours.get(key)!r}; choose another OUT, or {key}={theirs.get(key)}"
        for key in ours | theirs
        if ours.get(key) != theirs.get(key)
    ]
    known = json.loads((out / "run.json").read_text(encoding="utf-8")) if (out / "run.json").is_file() else {}
    for key, value in known.get("data", {}).items():
        if facts["data"].get(key) not in (None, value):
            problems.append(f"{out} holds another run: the content of data.{key} has changed; choose another OUT")
    return problems


def _facts(
    config_path: str, stack: str, task: ModuleType, train: Stream | None, valid: Stream | None, known: dict[str, Any]
) -> dict[str, Any]:
    return {
        "config": Path(config_path).stem, "family": task.FAMILY, "stack": stack,
        "data": {"train": train.content_hash if train else None, "valid": valid.content_hash if valid else None},
        "tokenizer": known.get("hash"), "commit": _commit(), "versions": {p: _version(p) for p in PACKAGES},
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    try:
        changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed or "unknown"
    except OSError:
        return "unknown"


def begin(run: Run) -> None:
    """Rank 0, once nothing can refuse the run any more: record its config and facts in OUT."""
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        config.write_yaml(run.cfg, run.out / "config.yaml")
        (run.out / "run.json").write_text(json.dumps(run.facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{run.out}: {error.strerror}; choose another OUT") from None


def _gib(estimate: dict[str, int]) -> str:
    parts = "  ".join(f"{name} {size / 2**30:.2f}" for name, size in estimate.items() if name != "total" and size)
    return f"{estimate['total'] / 2**30:.2f} GiB estimated ({parts})"


def describe(run: Run, task: ModuleType, command: Sequence[str]) -> str:
    """What --dry-run prints."""
    import shlex

    import yaml

    from common import memory

    model, layout, cfg = run.cfg.model, run.layout, run.cfg
    flops = task.forward_backward_flops(model, cfg.data.seq_len)
    lines = [yaml.safe_dump(cfg.dump(), sort_keys=False, width=120).rstrip(), ""]
    lines += [f"note: {note}" for note in run.notes]
    lines += [
        f"parameters        {model.parameters():,}",
        f"FLOPs a token     {flops['full']:.4g} forward and backward ({flops['causal']:.4g} counting the causal half only)",
        f"tokens a step     {cfg.train.global_batch} x {cfg.data.seq_len} = {run.tokens_per_step:,}",
        f"layout            {run.stack}: {layout.world} ranks = {layout.dp} dp x {layout.tp} tp x {layout.pp} pp, "
        f"{layout.accumulate} micro batches of {layout.micro_batch}",
        f"memory a rank     {_gib(memory.estimate_for(cfg, model, run.stack, layout.world))}",
        f"continues from    {run.resume.path if run.resume else 'nothing: a new run'}",
        f"command           {shlex.join(command)}",
    ]
    return "\n".join(lines)
