"""Which stack, and which of its layouts: the fastest that is predicted, by the search of scripts/plan.py, for some models on
some numbers of GPUs.

Where stacks are within the predictor's error of each other, the answer names them all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common import families
from common.comparison import planned
from common.comparison.figures import Figure, Options, Picture, Task
from common.comparison.planned import GPU, Best

SECTION = "Which one for you"
PART = "python -m scripts.benchmark --parts which_one"
SIMPLER = ("baseline", "deepspeed", "megatron")


class Model(NamedTuple):
    """A config that is planned."""

    path: str
    overrides: tuple[str, ...] = ()


# Llama 2 70B (arXiv:2307.09288, table 1 and section 2.2; its shapes in meta-llama's params.json): 4M tokens per step
LLAMA_70B = (
    "model.layers=80", "model.hidden=8192", "model.heads=64", "model.kv_heads=8", "model.ffn=28672", "data.seq_len=4096",
)  # fmt: skip
GPT = {
    "125M": Model("recipes/gpt/configs/gpt3_125m.yaml"),
    "1.3B": Model("recipes/gpt/configs/gpt3_1.3b.yaml"),
    "13B": Model("recipes/gpt/configs/gpt3_13b.yaml"),
    "70B (Llama)": Model("recipes/gpt/configs/llama_1b.yaml", LLAMA_70B),
    "175B": Model("recipes/gpt/configs/gpt3_175b.yaml"),
}
GPUS = (1, 8, 64, 1024)
ON_16 = {
    "BERT 1.3B": Model("recipes/bert/configs/megatron_1.3b.yaml"),
    "GPT 13B": Model("recipes/gpt/configs/gpt3_13b.yaml"),
}
RULES = {
    "the answer": "the fastest predicted layout, with the config's global batch",
    "fits": "by the estimate of memory, with at most 2 TB of host memory per node",
    "either": "the prediction cannot tell these apart; the first is the simplest. Each stack whose fastest layout takes longer "
    "by at most the larger of the two errors",
    "order": "the simpler first: baseline (PyTorch alone), deepspeed (the same model class), megatron (a class of its own)",
    "error": "the largest of the published rows that are near (same kind and GPU, up to 3 x the parameters), some of which the "
    "predictor was fitted to; else as below. No published row is of BERT, or of ZeRO 1 or 2: they get the error of the others",
    "layout": "zero is deepspeed.zero_stage, micro is micro_batch, dist-opt is megatron.distributed_optimizer, sp is "
    "sequence_parallel; a key that is not named is off. --write FILE of the command writes the config",
}


def which_one(options: Options, folder: Path) -> list[Figure]:
    return [
        *(figure for name, model in GPT.items() for gpus in GPUS for figure in cell(name, model, gpus, options.stacks)),
        *(figure for name, model in ON_16.items() for figure in on_16(name, model, options.stacks)),
        *rules(),
    ]


def best_of(model: Model, gpus: int, stacks: Sequence[str]) -> tuple[Best, str]:
    """(the best layouts, the line that yields them again)."""
    there = [stack for stack in families.stacks(families.of_config(model.path)) if stack in stacks]
    cfg = planned.resolved(model.path, model.overrides)
    return Best(cfg, there, gpus), planned.command(model.path, model.overrides, gpus, there)


def cell(name: str, model: Model, gpus: int, stacks: Sequence[str]) -> list[Figure]:
    """What to take for a model on a number of GPUs, and how long a step takes then."""
    best, source = best_of(model, gpus, stacks)
    column = f"{gpus:,} GPU{'s' * (gpus > 1)}"
    found = [Figure(f"{SECTION} / GPT on {GPU}", name, column, answer(best), "", "predicted", source)]
    fastest, seconds, mfu = best.fastest, f"{SECTION} / GPT on {GPU}, the fastest", f"{SECTION} / GPT on {GPU}, its MFU"
    if fastest is None:
        why = f"{answer(best)}: {source}"
        return [*found, *(Figure(section, name, column, None, unit, "predicted", why)
                          for section, unit in ((seconds, "s/step"), (mfu, "%")))]  # fmt: skip
    error = planned.error_of(fastest)
    return [
        *found, planned.predicted(seconds, name, column, fastest.seconds, "s/step", source, error),
        planned.predicted(mfu, name, column, 100 * fastest.mfu_full, "%", source, error),
    ]  # fmt: skip


def answer(best: Best) -> str:
    """'deepspeed zero=2 micro=2', 'either: baseline ..., or megatron ...', or 'does not fit'."""
    chosen = within_error(best)
    if not chosen:
        return max(best.none.values(), key=lambda why: (why.startswith("does not fit"), len(why)), default="does not fit")
    texts = []
    for stack in chosen:
        host = best.of[stack].host_memory / 1e9
        texts.append(planned.words_of(best.of[stack]) + (f" ({host:,.0f} GB of host memory per node)" if host else ""))
    return texts[0] if len(texts) == 1 else "either: " + ", or ".join(texts)


def within_error(best: Best) -> list[str]:
    """The stacks that may be the fastest, the simpler first."""
    fastest = best.fastest
    if fastest is None:
        return []
    least = planned.error_of(fastest)
    near = [stack for stack, one in best.of.items() if one.seconds <= fastest.seconds * (1 + max(least, planned.error_of(one)))]
    return sorted(near, key=SIMPLER.index)


def on_16(name: str, model: Model, stacks: Sequence[str]) -> list[Figure]:
    """What to take on 16 GPUs, and how long a step of each stack takes."""
    best, source = best_of(model, 16, stacks)
    section = f"{SECTION} / 16 x {GPU}"
    found = [Figure(section, name, "take", answer(best), "", "predicted", source)]
    for stack in best.stacks:
        one, metric = best.of.get(stack), f"{stack} s/step"
        if one is None:
            found.append(Figure(section, name, metric, None, "", "predicted", f"{best.none[stack]}: {source}"))
        else:
            found.append(planned.predicted(section, name, metric, one.seconds, "", source, planned.error_of(one)))
    return found


def rules() -> list[Figure]:
    """By what the cells are chosen, and the errors that it takes."""
    section, source = f"{SECTION} / Rule", "python -m scripts.plan --validate"
    known = planned.errors_of_kinds()
    rest = max(error for kind, error in known.items() if kind != "deepspeed pipeline")
    rows = {f"published rows of {kind}": error for kind, error in known.items()} | {"layouts without published rows": rest}
    return [
        *(Figure(section, name, "rule", text, "", "counted", PART) for name, text in RULES.items()),
        *(Figure(section, name, "largest error", 100 * error, "%", "counted", source) for name, error in rows.items()),
    ]


TASKS = (Task("which_one", SECTION, 30, which_one),)
PICTURES: tuple[Picture, ...] = ()
