"""Before a run starts: its config, data, layout and OUT are checked together, torch-free, and every problem is reported.

The launch script does it on the host, where the error is the last thing on the screen; each rank does it again.
"""

import contextlib
import importlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from common import config
from common.checkpoints import checkpoint, integrity, run_record
from common.config import Config
from common.contract import Dataset, Family
from common.data.indexed_dataset import IndexedDataset
from common.errors import BadInput, Missing
from common.json_files import read_object
from common.launch import lock
from common.layout import Layout, layout_for
from common.paths import SHOWN, Blend, find, find_blend, prefixes


class Run(NamedTuple):
    cfg: Config  # of the phase that goes on, resolved: no default is left open
    whole: Config  # the same with all its phases, as config.yaml records it
    stack: str
    out: Path
    layout: Layout
    train: Dataset | None  # None in a dry run whose corpus is not there yet
    valid: Dataset | None
    tokenizer: str | Path | None  # folder or name, if config or corpus knows one
    record: dict[str, Any]  # what run.json holds: hashes, versions, commit
    resume: checkpoint.Checkpoint | None
    notes: list[str]

    @property
    def tokens_per_step(self) -> int:
        return self.cfg.train.global_batch * self.cfg.data.sample_tokens

    @property
    def is_last_phase(self) -> bool:
        return self.cfg.train.steps == self.whole.last_step

    def samples(self, step: int) -> range:
        """The numbers of the samples that make up optimizer step `step` (the first is 1): none comes twice, none is left
        out, though a phase may have another batch."""
        before = begin = 0  # samples and steps of the phases before
        for phase in config.views(self.whole):
            size, end = phase.train.global_batch, phase.train.steps
            if step <= end or end == self.whole.last_step:
                first = before + (step - 1 - begin) * size
                return range(first, first + size)
            before, begin = before + (end - begin) * size, end
        raise AssertionError("the last phase has every later step")


def data_notes(*datasets: Dataset | None) -> list[str]:
    """What a user should know of the data: each note once, though train and dev were drawn from one file."""
    return list(dict.fromkeys(note for dataset in datasets if dataset for note in dataset.notes))


def prepare(
    config_path: str, out: str, overrides: Sequence[str], stack: str, task: Family, world: int, dry_run: bool = False
) -> Run:
    """Check everything that can be checked before a process starts; BadInput carries all problems found.

    dry_run: a corpus that is not there is a note, not a problem.
    """
    cfg = config.load(config_path, overrides, task.Config)
    problems: list[str] = []
    done = _steps_done(Path(out)) if cfg.phases else 0
    train, valid, data_problems, missing = _streams(config.at_step(cfg, done), task)
    folder, known = _tokenizer(cfg, train, valid, data_problems)
    notes = list(missing) if dry_run else []
    notes += data_notes(train, valid)
    problems += data_problems + ([] if dry_run else missing)
    if isinstance(folder, Path) and not folder.is_dir():
        notes.append(f"{folder}, the corpus's tokenizer, is not there: the export will hold none")
        folder = None

    out_path = Path(out)
    recorded = _recorded(out_path, type(cfg), problems)
    model = cfg.model.resolve(cfg, known.get("size"))
    decay = cfg.optim.decay_steps or recorded and recorded.optim.decay_steps
    # a trial of few steps may end while it warms up
    decay = decay or max(cfg.last_step, cfg.optim.warmup_steps + (cfg.optim.wsd_decay_steps or 0))
    if cfg.optim.schedule == "wsd" and not cfg.phases and cfg.last_step < decay:
        notes.append(f"the run ends at step {cfg.last_step}, and optim.schedule=wsd reaches optim.min_lr at step {decay}")
    falls = cfg.optim.schedule in config.FALLS_TO_MIN and cfg.optim.min_lr < cfg.optim.lr
    if recorded and not cfg.optim.decay_steps and falls and not cfg.phases and decay < cfg.last_step:
        notes.append(
            f"optim.decay_steps stays {decay}, the steps of the first start: from there on the rate is optim.min_lr; a longer "
            "schedule needs another OUT"
        )
    whole = cfg.model_copy(update={"model": model, "optim": cfg.optim.model_copy(update={"decay_steps": decay})})
    cfg = config.at_step(whole, done)
    if cfg.model.vocab_size or not data_problems + missing:
        problems += _vocabulary(cfg, train, valid, known)
    elif dry_run and not data_problems:  # else the tokenizer is unknown for what is told already
        problems += [*missing, *_vocabulary(cfg, train, valid, known)]
    for key, stream in (("data.train", train), ("data.valid", valid)):
        if stream is not None:
            stream.limit_ids(cfg.model.vocab_size, key)
    problems += _begins_from(cfg, task, notes)

    layout = None
    for number, view in enumerate(config.views(whole)):
        try:
            layout_of_phase = layout_for(view, stack, world)
            layout = layout_of_phase if view.train.steps == cfg.train.steps else layout
        except BadInput as error:
            where = f"{config_path}: phases[{number - 1}]" if number else config_path
            problems += [line for p in error.problems if not any(p in told for told in problems) for line in [f"{where}: {p}"]]

    record = run_record.new(config_path, stack, task, cfg, train, valid, known.get("hash"))
    resume = None
    if recorded:
        problems += _same_run(whole, recorded, record, out_path)
    if not problems:
        resume = checkpoint.latest(out_path, notes)
        if resume is not None:
            problems += _continues(whole, resume)
    reads_folder = cfg.init.from_ != "scratch" and (resume is None or getattr(cfg, "lora", None))
    if reads_folder and not problems and integrity.is_first_reader():
        problems += integrity.problems(find(cfg.init.from_), f"init.from={cfg.init.from_}")
    if problems:
        raise BadInput(problems)
    return Run(cfg, whole, stack, out_path, layout, train, valid, folder, record, resume, notes)


def task_module(family: str, values: dict[str, Any]) -> Family:
    """Of a config with these values: recipes/FAMILY/task.py, or finetune.py where they name a task. BadInput for an unknown
    family."""
    try:
        return importlib.import_module(f"recipes.{family}.{'finetune' if 'task' in values else 'task'}")
    except ModuleNotFoundError as error:
        raise BadInput(f"no recipe {family!r}: {error}") from None


def _steps_done(out: Path) -> int:
    """Steps of the newest whole checkpoint, 0 without one; what is wrong with it is told later."""
    try:
        newest = checkpoint.latest(out) if out.is_dir() else None
    except (BadInput, OSError):
        return 0
    return newest.step if newest else 0


def _streams(cfg: Config, task: Family) -> tuple[Dataset | None, Dataset | None, list[str], list[str]]:
    """train, valid, what is wrong with them, and which of them are not there."""
    made: list[Dataset | None] = []
    problems: list[str] = []
    missing: list[str] = []
    for key, spec, shuffle in (("data.train", cfg.data.train, True), ("data.valid", cfg.data.valid, False)):
        try:
            stream = None if spec is None else task.dataset(cfg, find_blend(spec), shuffle)
            if stream is not None:
                stream.verify()
            made.append(stream)
        except BadInput as error:
            found_here = missing if isinstance(error, Missing) else problems
            known = {line.removeprefix("data.train: ") for line in found_here}
            found_here += [_with_key(p, key, spec) for p in error.problems if p not in known]
            made.append(None)
    return made[0], made[1], problems, missing


def _with_key(problem: str, key: str, spec: Blend) -> str:
    """A problem of a corpus, with the key of the config that names the corpus; others name theirs."""
    is_of_it = not re.match(r"[a-z]+\.\w+[=:]", problem) and any(name[:SHOWN] in problem for name in prefixes(spec))
    return f"{key}: {problem}" if is_of_it else problem


def _tokenizer(
    cfg: Config, train: Dataset | None, valid: Dataset | None, problems: list[str]
) -> tuple[str | Path | None, dict[str, Any]]:
    """The tokenizer's folder (or name) and {hash, size, eod_id}; corpora and config must agree on the hash."""
    corpora = [corpus for stream in (train, valid) if stream is not None for corpus in stream.corpora]
    hashes = {corpus.prefix: corpus.tokenizer_hash for corpus in corpora if corpus.tokenizer_hash}
    folder, known = None, {}
    if cfg.data.tokenizer:
        from common.data import tokenizer

        try:
            folder = find(cfg.data.tokenizer) if find(cfg.data.tokenizer).is_dir() else cfg.data.tokenizer
            loaded = tokenizer.load(folder)
            known = {"hash": loaded.hash, "size": loaded.size}
            hashes = {f"data.tokenizer={cfg.data.tokenizer}": loaded.hash} | hashes
        except BadInput as error:
            problems += [p for p in error.problems if p not in problems]
    elif train is not None and train.corpora[0].manifest:
        first = train.corpora[0]
        problems += [p for p in _replaced(train, valid) if p not in problems]
        folder, known = first.tokenizer_dir, {"hash": first.tokenizer_hash, "size": first.manifest["tokenizer_size"]}
    if len(set(hashes.values())) > 1:
        told = ", ".join(f"{name} has {value[:12]}" for name, value in hashes.items())
        problems.append(f"the tokenizers differ ({told}); tokenize the corpora with one tokenizer (--tokenizer DIR)")
    return folder, known


def _replaced(train: Dataset | None, valid: Dataset | None) -> list[str]:
    """Corpora whose tokenizer folder is not the one that they were made with."""
    problems: list[str] = []
    done: set[tuple[Path, str | None]] = set()
    for key, stream in (("data.train", train), ("data.valid", valid)):
        for corpus in stream.corpora if stream else ():
            pair = corpus.tokenizer_dir, corpus.tokenizer_hash
            if isinstance(corpus, IndexedDataset) and pair not in done:
                done.add(pair)
                problems += [f"{key}: {problem}" for problem in corpus.tokenizer_problems()]
    return problems


def _vocabulary(cfg: Config, train: Dataset | None, valid: Dataset | None, known: dict[str, Any]) -> list[str]:
    size = cfg.model.vocab_size
    if size is None:
        return ["model.vocab_size: is missing, and no tokenizer is known to take it from; give model.vocab_size=N"]
    problems = []
    for name, stream in (("train", train), ("valid", valid)):
        for corpus in stream.corpora if stream else ():
            if corpus.max_token_id >= size:
                problems.append(
                    f"data.{name}: {corpus.prefix} holds token id {corpus.max_token_id} and model.vocab_size={size}; "
                    f"set model.vocab_size above it, or tokenize with a tokenizer of {size} ids"
                )
    if (known.get("size") or 0) > size:
        problems.append(f"model.vocab_size={size} is below the tokenizer's {known['size']} ids")
    return problems


def _begins_from(cfg: Config, task: Family, notes: list[str]) -> list[str]:
    """What is wrong with the Hugging Face folder init.from; adds to `notes`."""
    if cfg.init.from_ == "scratch":
        return []
    from common.huggingface import hf_folder

    return hf_folder.check(find(cfg.init.from_), f"init.from={cfg.init.from_}", cfg, task, notes)


def _recorded(out: Path, schema: type[Config], problems: list[str]) -> Config | None:
    """The config of the run that OUT holds, None if it holds none; problems if OUT cannot be used."""
    reason = unusable(out)
    if reason:
        problems.append(f"{out}: {reason}; choose another OUT")
        return None
    for name in ("metrics.jsonl", "run.json", "config.yaml"):
        if (out / name).exists() and not (out / name).is_file():
            problems.append(f"{out / name}: is no file, and a run writes one there; move it away, or choose another OUT")
    for name in ("tensorboard", "logs"):
        if (out / name).exists() and not (out / name).is_dir():
            problems.append(f"{out / name}: is no folder, and a run writes one there; move it away, or choose another OUT")
    if (out / "config.yaml").is_file():
        try:
            return config.recorded(out / "config.yaml", schema)
        except BadInput as error:
            problems += [f"{line}; restore that file, or choose another OUT" for line in error.problems]
        except ValidationError as error:
            keys = ", ".join(".".join(map(str, e["loc"])) for e in error.errors()[:3])
            problems.append(f"{out / 'config.yaml'}: is not the config of such a run ({keys}); choose another OUT")
    elif (out / "step_0" / "state.json").is_file():  # of `python -m recipes.FAMILY.convert from-hf`
        return None
    elif out.is_dir() and any(
        p.suffix not in (".tmp", ".part") and p.name not in ("tensorboard", "logs", lock.NAME) for p in out.iterdir()
    ):
        problems.append(f"{out}: is not empty and holds no run (no config.yaml); choose another OUT")
    return None


def unusable(out: Path) -> str | None:
    """Why nothing can be written into OUT, None if it can be. Leaves no trace."""
    try:
        if not os.path.lexists(out):
            with contextlib.suppress(FileNotFoundError):
                out.lstat()  # raises for a name that is too long, a loop of links, a file among its parents
        place = next(p for p in [out, *out.absolute().parents] if os.path.lexists(p))
        if not place.is_dir():
            what = "is a file" if place.exists() else "is a broken link"
            return what if place == out else f"{place} {what}"
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
    except OSError as error:
        return f"not writable ({error.strerror})"
    return None


def _same_run(cfg: Config, recorded: Config, record: dict[str, Any], out: Path) -> list[str]:
    """A hyperparameter that differs from the run in OUT makes another run of it: name each."""
    problems = _other_run(str(out), config.hyperparameters(cfg), config.hyperparameters(recorded))
    known = read_object(out / "run.json") if (out / "run.json").exists() else {"data": {}}
    if known is None or not isinstance(known.get("data"), dict):
        return [*problems, f"{out / 'run.json'}: cannot be read; restore it, or choose another OUT"]
    for key, value in known["data"].items():
        if record["data"].get(key) not in (None, value):
            problems.append(f"{out} holds another run: the content of data.{key} has changed; choose another OUT")
    return problems


def _other_run(where: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    if ours.get("phases", []) != theirs.get("phases", []):  # then the end of the first phase says nothing more
        ours, theirs = ({k: v for k, v in both.items() if k != "train.steps"} for both in (ours, theirs))
    told = {key: (config.written(theirs.get(key)), config.written(ours.get(key))) for key in ours | theirs}
    return [
        f"{where} holds another run: {key} was {was}, is {now}; choose another OUT, or {key}={was}"
        for key, (was, now) in told.items()
        if was != now
    ]


def _continues(cfg: Config, resume: checkpoint.Checkpoint) -> list[str]:
    """Can this run go on from that checkpoint?"""
    ours = config.hyperparameters(cfg)
    theirs = config.under_names_now(resume.hyperparameters, type(cfg)) or ours
    theirs = {key: value for key, value in theirs.items() if not config.may_change_on_resume(key, type(cfg))}
    if resume.meta.get("stack") == "huggingface":  # imported: only its shapes are given
        apart = ("model.dropout", "model.init_std")
        ours = {k: ours.get(k) for k in theirs if k not in apart}
        theirs = {k: v for k, v in theirs.items() if k not in apart}
    # a key that this checkpoint's version did not know has its default, which config.yaml was compared with
    problems = _other_run(str(resume.path), {k: ours.get(k) for k in theirs}, theirs)
    if cfg.last_step < resume.step:
        problems.append(
            f"train.steps={cfg.last_step} is below the {resume.step} steps that {resume.path.parent} has made; "
            f"give train.steps={resume.step} or more, or choose another OUT"
        )
    return problems
