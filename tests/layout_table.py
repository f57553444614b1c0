"""The layouts that tests compared with a plain loop, and how far each was from it, as tables of the documents.

    bash scripts/test.sh --record-layouts    each test that compares a run with a plain loop adds a row to tests/layouts.json
    python -m tests.layout_table             writes the tables of docs/layouts.md and recipes/*/README.md from it

Rows that are not measured again stay. To start over, delete the file.
"""

import argparse
import datetime
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common import config, families
from common.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_name("layouts.json")
PAGES = [ROOT / "docs/layouts.md", *sorted(ROOT.glob("recipes/*/README.md"))]
TABLE = re.compile(  # of a page: the generated lines stand between these two
    r"(<!-- measured: (?P<family>\w+) (?P<what>\w+) \(python -m tests.layout_table\) -->\n).*?(<!-- end of measured -->)", re.S
)
STACKS = {"baseline": "baseline", "deepspeed": "DeepSpeed", "megatron": "Megatron"}
LENGTHS = ("seq_len", "target_len", "length_window")  # of finetuning, as long as a test's samples
STEPS = 20  # of most comparisons
ALWAYS = {"baseline": (), "deepspeed": ("zero_stage",), "megatron": ()}  # keys that a row names even at their default
NOT_COMPARED = {  # hyperparameters that tests set for their own ends
    "data.train", "data.valid", "train.eval_samples", "train.seed", "train.dtype", "train.keep", "model.vocab_size",
    "optim.decay_steps",
}  # fmt: skip
Row = dict[str, Any]


def row_of(run: Path, test: str, loss: float, norm: float) -> Row:
    """A row for a finished run. loss: largest difference over its steps; norm: that of the gradient norm, relative."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    values, stack = read_yaml(run / "config.yaml"), record["stack"]
    defaults = config.sections(config.Config)[stack].model_validate({}).model_dump()
    state = json.loads(max(run.glob("**/step_*/state.json")).read_text(encoding="utf-8"))
    keys = {
        key: value
        for key, value in values[stack].items()
        if key == "micro_batch" or key in ALWAYS[stack] or value != defaults[key]
    }
    return {
        "test": test, "family": record["family"], "model": values["model"]["arch"], "kind": _kind(record, values),
        "stack": stack, "keys": keys, "ranks": state["layout"]["world"],
        "date": str(datetime.date.today()), "loss": float(f"{loss:.1e}"), "norm": float(f"{norm:.1e}"),
    }  # fmt: skip


def _kind(record: Row, values: dict[str, Any]) -> str:
    """What was trained: the task, and the hyperparameters in which the run differs from its config in the repository, or from
    the defaults of finetuning's data."""
    if "task" in values:
        kinds = config.sections(families.module_of("finetune", record["family"]).Config)
        lengths = {name: values["data"][name] for name in LENGTHS if name in values["data"]}
        own = {"data": kinds["data"].model_validate(lengths).model_dump(), "train": {"steps": STEPS}}
        what = values["task"]["name"] + (" LoRA" if values.get("lora") else "")
    else:
        path = ROOT / "recipes" / record["family"] / "configs" / f"{record['config']}.yaml"
        cfg = config.load(path, [], families.module_of("task", record["family"]).Config)
        own, what = cfg.dump() | {"model": cfg.model.filled(cfg, values["model"]["vocab_size"])}, ""
    run, before = config.flat(values), config.flat(own)
    compared = [key for key in before if key.partition(".")[0] not in STACKS and key not in NOT_COMPARED]
    changed = [f"{key}={config.written(run[key])}" for key in compared if key in run and run[key] != before[key]]
    dtype = "" if values["train"]["dtype"] == "fp32" else f"train.dtype={values['train']['dtype']}"
    return " ".join(filter(None, [dtype, what, *changed]))


def identity(row: Row) -> str:
    """The fields that identify a row."""
    return json.dumps({key: value for key, value in row.items() if key not in ("loss", "norm", "date")}, sort_keys=True)


def recorded() -> list[Row]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else []


def record(rows: Iterable[Row]) -> None:
    """Add these rows to the file, in place of those of the same layout."""
    by_layout = {identity(row): row for row in [*recorded(), *rows]}
    RECORD.write_text("[\n" + ",\n".join(sorted(map(json.dumps, by_layout.values()))) + "\n]\n", encoding="utf-8")


def tables(family: str, what: str) -> str:
    """what: `curves`, pretraining in fp32 as the tiny configs have it; `others`, every other comparison; `finetuning`."""
    rows = [row for row in recorded() if row["family"] == family]
    rows = [row for row in rows if ("finetune" in row["test"]) == (what == "finetuning")]
    if what == "finetuning":
        lines = _long(rows, "task")
    elif what == "curves":
        lines = _wide(rows := [row for row in rows if not row["kind"]])
    else:
        lines = _long(rows := [row for row in rows if row["kind"]], "differs from the config in")
    return "\n".join([*lines, "", f"Measured on {max(row['date'] for row in rows)}." if rows else "Not measured."])


def _layout(row: Row) -> tuple[str, str, int]:
    """('DeepSpeed', 'zero_stage=2 offload=optimizer micro_batch=2', ranks), as a reader would type it."""
    last = sorted(row["keys"].items(), key=lambda item: item[0] == "micro_batch")
    keys = " ".join(f"{key}={config.written(value)}" for key, value in last)
    return STACKS[row["stack"]], keys.replace("|", r"\|"), row["ranks"]  # a bar would end the cell


def _order(row: Row) -> tuple[Any, ...]:
    return row["ranks"], list(STACKS).index(row["stack"]), _layout(row)


def _wide(rows: list[Row]) -> Iterator[str]:
    """One line per layout, two columns per model."""
    models = sorted({row["model"] for row in rows})
    yield "| stack | keys | ranks | " + " | ".join(f"`{m}`: loss | gradient norm, relative" for m in models) + " |"
    yield "|---|---|---|" + "---|---|" * len(models)
    by_layout: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in sorted(rows, key=_order):
        by_layout.setdefault(_layout(row), {})[row["model"]] = row
    for (stack, keys, ranks), measured in by_layout.items():
        cells = [f"{measured[m]['loss']:.1e} | {measured[m]['norm']:.1e}" if m in measured else " | " for m in models]
        yield f"| {stack} | `{keys}` | {ranks} | " + " | ".join(cells) + " |"


def _long(rows: list[Row], kind: str) -> Iterator[str]:
    """One line per row. In bf16 only the loss is compared, with the loop in fp32."""
    yield f"| {kind} | model | stack | keys | ranks | loss | gradient norm, relative |"
    yield "|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: (row["kind"], row["model"], *_order(row))):
        stack, keys, ranks = _layout(row)
        norm = "" if "bf16" in row["kind"] else f"{row['norm']:.1e}"
        yield f"| `{row['kind']}` | `{row['model']}` | {stack} | `{keys}` | {ranks} | {row['loss']:.1e} | {norm} |"


def page(text: str) -> str:
    """A page with its tables written again."""
    return TABLE.sub(lambda found: f"{found[1]}\n{tables(found['family'], found['what'])}\n\n{found[4]}", text)


def main() -> None:
    argparse.ArgumentParser(prog="python -m tests.layout_table", description=__doc__.splitlines()[0]).parse_args()
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        path.write_text(page(text), encoding="utf-8")


if __name__ == "__main__":
    main()
