"""The checks before a run starts: config, data, layout and OUT together, torch-free. All problems are reported at once.

The launch script runs them on the host, where an error is the last thing on the screen; each rank runs them again.
"""

import contextlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple

from pydantic import ValidationError
from typing_extensions import TypeVar

from common import config
from common.checkpoints import checkpoint, integrity, run_record
from common.config import Config
from common.contract import Dataset, Family, FamilyOf
from common.data.indexed_dataset import IndexedDataset
from common.errors import BadInput, Missing
from common.json_files import read_object
from common.launch import lock
from common.layout import Layout, fitting, layout_for
from common.paths import SHOWN, Blend, find, prefixes
from common.training.optim import lr_at

C = TypeVar("C", bound=Config, default=Config, covariant=True)


class Run(NamedTuple, Generic[C]):  # noqa: UP046 (with Python 3.12 only typing_extensions knows defaults)
    """A run that may start: what `prepare` has checked."""

    cfg: C  # a family's ResolvedConfig, of the current phase
    whole: C  # the same with all phases, as config.yaml records it
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
        """The numbers of the samples of optimizer step `step` (the first is 1). No sample is skipped or repeated, although a
        phase may have another batch size."""
        before = begin = 0  # samples and steps of the phases before
        for phase in config.views(self.whole):
            size, end = phase.train.global_batch, phase.train.steps
            if step <= end or end == self.whole.last_step:
                first = before + (step - 1 - begin) * size
                return range(first, first + size)
            before, begin = before + (end - begin) * size, end
        raise AssertionError("the last phase has every later step")


def _of_another_family(config_path: str, family: str, problems: Sequence[str]) -> str:
    """What to say of a config whose architecture is another family's, in place of `problems`; "" if it is this one's."""
    from common import families

    try:
        other = families.of_config(config_path)
    except BadInput:  # it lies in no recipe
        return ""
    if other == family or not any("model.arch" in problem for problem in problems):
        return ""
    return f"{config_path}: is a config of {other}; give it to a script of recipes/{other}"


def data_notes(*datasets: Dataset | None) -> list[str]:
    """The notes of the datasets, each once, although train and dev may be drawn from one file."""
    return list(dict.fromkeys(note for dataset in datasets if dataset for note in dataset.notes))


def prepare[C: Config](
    config_path: str, out: str, overrides: Sequence[str], stack: str, task: FamilyOf[C], world: int, dry_run: bool = False,
    worlds: Sequence[int] = (),
) -> Run[C]:  # fmt: skip
    """Check everything that can be checked before a process starts. BadInput carries all problems.

    dry_run: a corpus that does not exist is a note, not a problem. worlds: the numbers of ranks that an elastic run may have;
    its layout is that of the largest one with which it can run.
    """
    try:
        loaded = config.load(config_path, overrides, task.Config)
    except BadInput as error:
        raise BadInput(_of_another_family(config_path, task.FAMILY, error.problems) or error.problems) from None
    problems: list[str] = []
    done = _steps_done(Path(out)) if loaded.phases else 0
    train, valid, data_problems, missing = _datasets(config.at_step(loaded, done), task, stack)
    folder, tokenizer_info = _tokenizer(loaded, train, valid, data_problems)
    notes = list(missing) if dry_run else []
    notes += data_notes(train, valid)
    problems += data_problems
    if isinstance(folder, Path) and not folder.is_dir():
        notes.append(f"{folder}, the corpus's tokenizer, does not exist: the export will have none")
        folder = None

    out_path = Path(out)
    recorded = _recorded(out_path, type(loaded), problems)
    if recorded and recorded.data.train != loaded.data.train:
        missing = [f"{line}; give that of {out}, data.train={config.written(recorded.data.train)}" for line in missing]
    problems += [] if dry_run else missing
    decay = loaded.optim.decay_steps or recorded and recorded.optim.decay_steps
    # a trial of a few steps may end during the warmup
    first_decay = max(loaded.last_step, loaded.optim.warmup_steps + (loaded.optim.wsd_decay_steps or 0))
    decay = decay or first_decay
    if loaded.optim.schedule == "wsd" and not loaded.phases and loaded.last_step < decay:
        notes.append(f"the run ends at step {loaded.last_step}, and optim.schedule=wsd reaches optim.min_lr at step {decay}")
    falls = loaded.optim.schedule in config.FALLS_TO_MIN and loaded.optim.min_lr < loaded.optim.lr
    keeps_decay = recorded and not loaded.optim.decay_steps and falls and not loaded.phases
    if keeps_decay and decay < loaded.last_step:
        notes.append(
            f"optim.decay_steps stays {decay}, the steps of the first start: after that the rate is optim.min_lr; a longer "
            "schedule needs another OUT"
        )
    optim = loaded.optim.model_copy(update={"decay_steps": decay})
    if keeps_decay and optim.schedule != "wsd" and first_decay < decay:
        rate = f"{lr_at(loaded.last_step, optim):.3g}, above optim.min_lr={optim.min_lr:g}"
        notes.append(
            f"optim.decay_steps stays {decay}, the steps of the first start: the rate ends at {rate}; a schedule of "
            f"{loaded.last_step} steps needs another OUT"
        )
    unknown: list[str] = []  # where the size of the vocabulary is not known
    try:
        whole = config.resolve(loaded, task.ResolvedConfig, tokenizer_info.get("size"), optim=optim)
    except BadInput as error:
        unknown = error.problems
        whole = config.resolve(loaded, task.ResolvedConfig, 1, optim=optim)  # to check the rest
    cfg = config.at_step(whole, done)
    if not unknown:
        problems += _vocabulary(cfg, train, valid, tokenizer_info)
    elif not data_problems + missing:
        problems += unknown
    elif dry_run and not data_problems:  # else the tokenizer is unknown because of a problem that is reported already
        problems += [*missing, *unknown]
    if valid is not None and (cfg.train.eval_samples or 0) > len(valid):
        notes.append(
            f"data.valid has {len(valid)} {valid.unit}, fewer than train.eval_samples={cfg.train.eval_samples}: all are used"
        )
    for key, dataset in (("data.train", train), ("data.valid", valid)):
        if dataset is not None:
            dataset.limit_ids(None if unknown else cfg.model.vocab_size, key)
    problems += _init_problems(cfg, task, notes, bool(unknown))
    if cfg.log.wandb and not importlib.util.find_spec("wandb"):
        problems.append(f"log.wandb={cfg.log.wandb}: wandb is not installed; type bash scripts/setup.sh wandb, or leave it out")

    world = max(fitting(config.views(whole), stack, worlds), default=world)
    layout = None
    for number, phase in enumerate(config.views(whole)):
        try:
            layout_of_phase = layout_for(phase, stack, world)
            layout = layout_of_phase if phase.train.steps == cfg.train.steps else layout
        except BadInput as error:
            where = f"{config_path}: phases[{number - 1}]" if number else config_path
            problems += [f"{where}: {p}" for p in error.problems if not any(p in line for line in problems)]

    record = run_record.new(config_path, stack, task, cfg, train, valid, tokenizer_info.get("hash"))
    resume = None
    if recorded:
        other = _same_run(whole, recorded, record, out_path)
        problems += [p for p in other if not unknown or ": model.vocab_size was " not in p]
    if not problems:
        resume = checkpoint.latest(out_path, notes)
        if resume is not None:
            problems += _continues(whole, resume)
    reads_folder = cfg.init.from_ != "scratch" and (resume is None or cfg.adapters)
    if reads_folder and not problems and integrity.is_first_reader():
        problems += integrity.problems(find(cfg.init.from_), f"init.from={cfg.init.from_}")
    if problems:
        raise BadInput(problems)
    assert layout is not None  # each phase has one, else there is a problem
    return Run(cfg, whole, stack, out_path, layout, train, valid, folder, record, resume, notes)


def task_module(family: str, values: dict[str, Any]) -> Family:
    """The module of the family for a config with these values: recipes/FAMILY/task.py, or finetune.py if they have a section
    `task`. BadInput for an unknown family."""
    try:
        return importlib.import_module(f"recipes.{family}.{'finetune' if 'task' in values else 'task'}")
    except ModuleNotFoundError as error:
        raise BadInput(f"no recipe {family!r}: {error}") from None


def _steps_done(out: Path) -> int:
    """The step of the newest whole checkpoint, 0 without one. A problem with it is reported later."""
    try:
        newest = checkpoint.latest(out) if out.is_dir() else None
    except (BadInput, OSError):
        return 0
    return newest.step if newest else 0


def _datasets(cfg: Config, task: Family, stack: str) -> tuple[Dataset | None, Dataset | None, list[str], list[str]]:
    """The datasets of data.train and data.valid, the problems with them, and the problems of files that do not exist."""
    datasets: list[Dataset | None] = []
    problems: list[str] = []
    missing: list[str] = []
    for key, blend, shuffle in (("data.train", cfg.data.train, True), ("data.valid", cfg.data.valid, False)):
        dataset = None
        if blend is not None:
            try:
                dataset = task.dataset(cfg, blend, shuffle, stack)
                dataset.verify()
            except BadInput as error:
                dataset = None
                lines = missing if isinstance(error, Missing) else problems
                reported = {line.removeprefix("data.train: ") for line in lines}
                lines += [_with_key(p, key, blend) for p in error.problems if p not in reported]
        datasets.append(dataset)
    return datasets[0], datasets[1], problems, missing


def _with_key(problem: str, key: str, blend: Blend) -> str:
    """A problem of a corpus, preceded by the config's key for that corpus. A problem that names a key stays as it is."""
    has_key = re.match(r"[a-z]+\.\w+[=:]", problem)
    is_of_corpus = any(name[:SHOWN] in problem for name in prefixes(blend))
    return f"{key}: {problem}" if is_of_corpus and not has_key else problem


def _tokenizer(
    cfg: Config, train: Dataset | None, valid: Dataset | None, problems: list[str]
) -> tuple[str | Path | None, dict[str, Any]]:
    """The tokenizer's folder (or name) and {hash, size}. Corpora and config must have the same hash."""
    corpora = [corpus for dataset in (train, valid) if dataset is not None for corpus in dataset.corpora]
    hashes = {corpus.prefix: corpus.tokenizer_hash for corpus in corpora if corpus.tokenizer_hash}
    folder: str | Path | None = None
    tokenizer_info: dict[str, Any] = {}
    if cfg.data.tokenizer:
        from common.data import tokenizer

        try:
            folder = find(cfg.data.tokenizer) if find(cfg.data.tokenizer).is_dir() else cfg.data.tokenizer
            loaded = tokenizer.load(folder)
            tokenizer_info = {"hash": loaded.hash, "size": loaded.size}
            hashes = {f"data.tokenizer={cfg.data.tokenizer}": loaded.hash} | hashes
        except BadInput as error:
            problems += [p for p in error.problems if p not in problems]
    elif train is not None and train.corpora[0].manifest:
        first = train.corpora[0]
        problems += [p for p in _replaced(train, valid) if p not in problems]
        folder, tokenizer_info = first.tokenizer_dir, {"hash": first.tokenizer_hash, "size": first.manifest["tokenizer_size"]}
    if len(set(hashes.values())) > 1:
        listed = ", ".join(f"{name} has {value[:12]}" for name, value in hashes.items())
        problems.append(f"the tokenizers differ ({listed}); tokenize the corpora with one tokenizer (--tokenizer DIR)")
    return folder, tokenizer_info


def _replaced(train: Dataset | None, valid: Dataset | None) -> list[str]:
    """Problems of corpora whose tokenizer folder is not the one that they were tokenized with."""
    problems: list[str] = []
    checked: set[tuple[Path | None, str | None]] = set()
    for key, dataset in (("data.train", train), ("data.valid", valid)):
        for corpus in dataset.corpora if dataset else ():
            pair = corpus.tokenizer_dir, corpus.tokenizer_hash
            if isinstance(corpus, IndexedDataset) and pair not in checked:
                checked.add(pair)
                problems += [f"{key}: {problem}" for problem in corpus.tokenizer_problems()]
    return problems


def _vocabulary(cfg: Config, train: Dataset | None, valid: Dataset | None, tokenizer_info: dict[str, Any]) -> list[str]:
    size = cfg.model.vocab_size
    problems = []
    for name, dataset in (("train", train), ("valid", valid)):
        for corpus in dataset.corpora if dataset else ():
            if corpus.max_token_id >= size:
                problems.append(
                    f"data.{name}: {corpus.prefix} holds token id {corpus.max_token_id} and model.vocab_size={size}; "
                    f"set model.vocab_size above it, or tokenize with a tokenizer of {size} ids"
                )
    if (tokenizer_info.get("size") or 0) > size:
        problems.append(f"model.vocab_size={size} is below the tokenizer's {tokenizer_info['size']} ids")
    return problems


def _init_problems(cfg: Config, task: Family, notes: list[str], is_vocabulary_unknown: bool) -> list[str]:
    """The problems of the Hugging Face folder init.from. Adds to `notes`.

    is_vocabulary_unknown: the model cannot be compared with the folder's; what is checked is that there is a folder.
    """
    if cfg.init.from_ == "scratch":
        return []
    from common.huggingface import hf_folder

    folder, name = find(cfg.init.from_), f"init.from={cfg.init.from_}"
    if is_vocabulary_unknown:
        return hf_folder.config_problems(folder, name)
    return hf_folder.check(folder, name, cfg, task, notes)


def _recorded(out: Path, schema: type[Config], problems: list[str]) -> Config | None:
    """The config of the run in OUT, None if there is no run. Adds to `problems` if OUT cannot be used."""
    reason = unusable(out)
    if reason:
        problems.append(f"{out}: {reason}; choose another OUT")
        return None
    for name in ("metrics.jsonl", "run.json", "config.yaml"):
        if (out / name).exists() and not (out / name).is_file():
            problems.append(f"{out / name}: must be a file that the run writes; move it away, or choose another OUT")
    for name in ("tensorboard", "logs"):
        if (out / name).exists() and not (out / name).is_dir():
            problems.append(f"{out / name}: must be a folder that the run writes; move it away, or choose another OUT")
    if not _is_export(out / "hf"):
        problems.append(f"{out / 'hf'}: must be the export that the run writes; move it away, or choose another OUT")
    if (out / "config.yaml").is_file():
        try:
            return config.recorded(out / "config.yaml", schema)
        except BadInput as error:
            problems += [f"{line}; restore that file, or choose another OUT" for line in error.problems]
        except ValidationError as error:
            keys = ", ".join(".".join(map(str, e["loc"])) for e in error.errors()[:3])
            problems.append(f"{out / 'config.yaml'}: is the config of another family or version ({keys}); choose another OUT")
    elif (out / "step_0" / "state.json").is_file():  # of `python -m recipes.FAMILY.convert from-hf`
        return None
    elif out.is_dir() and any(
        p.suffix not in (".tmp", ".part") and p.name not in ("tensorboard", "logs", lock.NAME) for p in out.iterdir()
    ):
        problems.append(f"{out}: is not empty and has no run (no config.yaml); choose another OUT")
    return None


def _is_export(folder: Path) -> bool:
    """May the run replace this folder? Not what is there and has no twinstack.json: it is somebody's own."""
    if folder.is_symlink() or not folder.exists():
        return not folder.is_symlink()
    return folder.is_dir() and ((folder / integrity.RECORD).is_file() or not any(folder.iterdir()))


def unusable(out: Path) -> str | None:
    """Why OUT cannot be written to; None if it can. Leaves no trace."""
    try:
        if not os.path.lexists(out):
            with contextlib.suppress(FileNotFoundError):
                out.lstat()  # raises for a name that is too long, a loop of links, a file among its parents
        nearest = next(p for p in [out, *out.absolute().parents] if os.path.lexists(p))
        if not nearest.is_dir():
            what = "is a file" if nearest.exists() else "is a broken link"
            return what if nearest == out else f"{nearest} {what}"
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"x")
    except OSError as error:
        return f"not writable ({error.strerror})"
    return None


def _same_run(cfg: Config, recorded: Config, record: dict[str, Any], out: Path) -> list[str]:
    """One line for each hyperparameter, and each corpus, that differs from that of the run in OUT."""
    problems = _other_run(str(out), config.hyperparameters(cfg), config.hyperparameters(recorded))
    before = read_object(out / "run.json") if (out / "run.json").exists() else {"data": {}}
    if before is None or not isinstance(before.get("data"), dict):
        return [*problems, f"{out / 'run.json'}: cannot be read; restore it, or choose another OUT"]
    family = before.get("family")
    if family not in (None, record["family"]):  # equal shapes do not make two recipes one model
        problems.append(f"{out} has a run of recipes/{family}; continue it with that recipe, or choose another OUT")
    for key, value in before["data"].items():
        if record["data"].get(key) not in (None, value):
            problems.append(f"{out} has another run: the content of data.{key} has changed; choose another OUT")
    return problems


def _other_run(where: str, values: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """One line for each hyperparameter that differs. before: those of the run that `where` has."""
    if values.get("phases", []) != before.get("phases", []):  # then the end of the first phase does not matter
        values, before = ({k: v for k, v in both.items() if k != "train.steps"} for both in (values, before))
    written = {key: (config.written(before.get(key)), config.written(values.get(key))) for key in values | before}
    return [
        f"{where} has another run: {key} was {was}, is {now}; choose another OUT, or {key}={was}"
        for key, (was, now) in written.items()
        if was != now
    ]


def _continues(cfg: Config, resume: checkpoint.Checkpoint) -> list[str]:
    """Why this run cannot continue from a checkpoint."""
    values = config.hyperparameters(cfg)
    before = config.under_names_now(resume.hyperparameters, type(cfg)) or values
    before = {key: value for key, value in before.items() if not config.may_change_on_resume(key, type(cfg))}
    if resume.meta.get("stack") == "huggingface":  # imported: of the model only the shapes are known
        before = {key: value for key, value in before.items() if key not in ("model.dropout", "model.init_std")}
    # a key that the version of the checkpoint did not have has its default, with which config.yaml was compared
    problems = _other_run(str(resume.path), {key: values.get(key) for key in before}, before)
    if cfg.last_step < resume.step:
        problems.append(
            f"train.steps={cfg.last_step} is below the {resume.step} steps that {resume.path.parent} has made; "
            f"give train.steps={resume.step} or more, or choose another OUT"
        )
    return problems
