"""The commands of recipes/*/convert.py: a run as a Hugging Face folder, and such a folder as the beginning of a run."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from common import config
from common.checkpoints import checkpoint, integrity, parameters, pieces
from common.checkpoints.pieces import Batch
from common.command_line import Parser
from common.contract import Family, PretrainingFamily
from common.data import tokenizer as tokenizers
from common.errors import BadInput
from common.huggingface import export, hf_folder
from common.json_files import read_object
from common.launch import lock, processes
from common.preflight import task_module
from common.training import init
from common.yaml_files import read_yaml

SEED = 1234  # of heads that a folder lacks
TOKENIZER = "imported_tokenizer"  # in OUT of from-hf: of the imported weights; a run that goes on has that of its corpus


class Imported(NamedTuple):
    """Stands in for a config (export.Exportable) when the weights were imported, not trained by a run."""

    model: Any

    def dump(self) -> dict[str, Any]:
        return {"model": self.model.model_dump(by_alias=True)}


def to_hf(run: Path, folder: Path, task: Family) -> None:
    """Write the last whole checkpoint of a run, or what from_hf wrote, as a Hugging Face folder."""
    is_import = not (run / "config.yaml").is_file() and (run / "step_0/state.json").is_file()
    if not is_import and not (run / "config.yaml").is_file():
        raise BadInput(f"{run}: has no run (no config.yaml); give the OUT of a pretrain.sh or of from-hf")
    _check_new(folder)
    unfinished = export.unfinished(folder)
    if unfinished.exists():
        raise BadInput(f"{unfinished}: exists, and to-hf writes there first; remove it, or give another HF_DIR")
    last = checkpoint.latest(run)
    if last is None:
        raise BadInput(f"{run}: has no checkpoint yet; it is saved at train.save_every and after the last step")
    if is_import:
        imported = Imported(_imported_model(run, task))
        _same_model(imported.model, last, run / "model.yaml")
        origin = {"config": run.resolve().name, "family": task.FAMILY, "stack": "huggingface"}
        export.write(last, imported, task, folder, run / TOKENIZER, origin)
        print(f"{folder}: the weights that from-hf put into {run}")
        return
    task = task_module(task.FAMILY, read_yaml(run / "config.yaml"))  # that of finetuning too
    cfg = config.load(run / "config.yaml", [], task.ResolvedConfig, recorded=True)
    _same_model(cfg.model, last, run / "config.yaml")
    record = read_object(run / "run.json")
    if record is None:
        raise BadInput(f"{run}: its run.json does not exist or cannot be read; the same pretrain.sh command writes it again")
    export.write(last, cfg, task, folder, run / "tokenizer", record)
    print(f"{folder}: step {last.step:,} of {run}")


def _imported_model(run: Path, task: Family) -> Any:
    """The `model` section that from_hf wrote."""
    path = run / "model.yaml"
    if not path.is_file():
        raise BadInput(f"{run}: has step_0 but no model.yaml; repeat from-hf into a new OUT")
    try:
        return task.ResolvedModel.model_validate(read_yaml(path).get("model"))
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, e["loc"])) or "model" for e in error.errors()[:3])
        raise BadInput(
            f"{path}: is not the model section that from-hf writes ({keys}); repeat from-hf into a new OUT"
        ) from None


def _same_model(model: Any, last: checkpoint.Checkpoint, path: Path) -> None:
    """BadInput unless a `model` section is the one in the checkpoint's state.json, which has a checksum: a key such as norm_eps
    shows in no shape."""
    recorded = last.hyperparameters
    values = {f"model.{key}": config.written(value) for key, value in model.model_dump(by_alias=True).items()}
    wrong = [
        f"{path}: says {key}={value}, {last.path / 'state.json'} {key}={config.written(recorded[key])}; restore {path.name}"
        for key, value in values.items()
        if key in recorded and config.written(recorded[key]) != value
    ]
    if wrong:
        raise BadInput(wrong)


def _check_new(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: is a file; give a new folder")
    if folder.exists() and any(path.name != lock.NAME for path in folder.iterdir()):
        raise BadInput(f"{folder}: is not empty; give a new folder")


def from_hf(folder: Path, out: Path, task: PretrainingFamily) -> None:
    """Write OUT/step_0 with the weights of a Hugging Face folder, its tokenizer, and OUT/model.yaml, the `model` section to
    train it with. `pretrain.sh CONFIG OUT` of any stack continues from there, if CONFIG has that section."""
    _check_new(out)
    model, notes = hf_folder.model_in(folder, task, SEED)
    changed = integrity.problems(folder, str(folder))
    if changed:
        raise BadInput(changed)
    for note in notes:
        print(f"note: {note}")
    scratch = init.scratch(SEED, lambda name: task.initializer(model, name))
    source = init.from_hf(folder, task.stored_names, task.optional_prefixes(model), scratch)

    shapes = parameters.expected(model, task)

    def batches() -> Iterator[Batch]:
        for name, shape in shapes.items():
            yield Batch([name], list(pieces.cut(pieces.whole(name, shape), "weight", source(name, shape).view(-1))))

    processes.quiet()
    processes.start()
    hyperparameters = {f"model.{key}": value for key, value in model.model_dump().items()}
    meta = {"step": 0, "samples": 0, "stack": "huggingface", "hyperparameters": hyperparameters}
    with lock.locked(out):
        _check_new(out)
        try:
            tokenizers.copy_files(folder, out / TOKENIZER)
            config.write_section(out / "model.yaml", "model", model)
            checkpoint.save(out, batches(), shapes, meta, keep=1)  # last: an OUT with a checkpoint is whole
        except BaseException:
            for path in out.iterdir():  # OUT was empty
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != lock.NAME:
                    path.unlink()
            raise
    print(f"{out}: step_0 and model.yaml, from {folder}")


def main(task: PretrainingFamily) -> None:
    """The command line."""
    name = f"python -m recipes.{task.FAMILY}.convert"
    parser = Parser(prog=name, description="Hugging Face folders from runs, and runs from them.")
    commands = parser.add_subparsers(dest="command", required=True)
    there = commands.add_parser("to-hf", help="the last checkpoint of a run, or what from-hf wrote, in Hugging Face form")
    there.add_argument("run", type=Path, metavar="RUN")
    there.add_argument("folder", type=Path, metavar="HF_DIR")
    back = commands.add_parser("from-hf", help="a run's starting point from a Hugging Face folder, for any stack")
    back.add_argument("folder", type=Path, metavar="HF_DIR")
    back.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args()
    if args.command == "to-hf":
        to_hf(args.run, args.folder, task)
    else:
        from_hf(args.folder, args.out, task)
