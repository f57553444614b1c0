"""The names of all scores: the metrics of every task, the unit of each, and the averages that are computed from them.

Evaluators name the scores in eval.json after this table (`row` refuses any other name). A config's `expect` is checked against
it when the config is loaded (`problems`), and scripts/check.py looks scores up in it. A key of `expect` is TASK_METRIC, and its
value is in one of the units below: `lambada_accuracy: {value: 0.4518, ...}`, `squad_f1: {value: 88.5, ...}`.

fraction      0 to 1: 0.844 is published as 84.4 %
correlation   -1 to 1
percent       0 to 100, where the benchmark's own script prints percentages: SQuAD, BLEU, chrF, ROUGE
"""

import difflib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple


class Unit(NamedTuple):
    name: str
    better: int  # 1: higher is better, -1: lower is better, 0: neither
    least: float = 0.0
    most: float = float("inf")


FRACTION = Unit("fraction", 1, 0.0, 1.0)
CORRELATION = Unit("correlation", 1, -1.0, 1.0)
PERCENT = Unit("percent", 1, 0.0, 100.0)
PERPLEXITY = Unit("perplexity", -1, 1.0)
BITS_PER_BYTE = Unit("bits per byte", -1)
NATS = Unit("nats", -1)
LOGITS = Unit("logits", 0, float("-inf"))
COUNT = Unit("parameters", 0)

_WORDS = {"word_perplexity": PERPLEXITY, "token_perplexity": PERPLEXITY}
_TOKENS = {"token_perplexity": PERPLEXITY, "bits_per_byte": BITS_PER_BYTE}
_TRAINED = {"loss": NATS, "perplexity": PERPLEXITY}
_ACCURACY = {"accuracy": FRACTION}
_F1_ACCURACY = {"f1": FRACTION, "accuracy": FRACTION}
_SQUAD = {"f1": PERCENT, "exact_match": PERCENT}
_BLEU = {"bleu": PERCENT, "bleu_intl": PERCENT, "chrf": PERCENT}
_ROUGE = dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), PERCENT)

# The first metric of a task decides which checkpoint of a finetuning run is the best.
TASKS: dict[str, dict[str, Unit]] = {
    "wikitext103": _WORDS, "wikitext2": _WORDS, "wikitext2-raw": _TOKENS, "text": _TOKENS,
    "lambada": {"accuracy": FRACTION, "last_token_accuracy": FRACTION},
    "lm": _TRAINED, "sft": _TRAINED,
    "cola": {"matthews": CORRELATION},
    "sst2": _ACCURACY,
    "mrpc": _F1_ACCURACY,
    "stsb": {"pearson": CORRELATION, "spearman": CORRELATION},
    "qqp": _F1_ACCURACY,
    "mnli": {"accuracy": FRACTION, "accuracy_mismatched": FRACTION},
    "qnli": _ACCURACY, "rte": _ACCURACY, "wnli": _ACCURACY,
    "squad": _SQUAD,
    "squad2": _SQUAD | {
        "has_answer_f1": PERCENT, "has_answer_exact": PERCENT, "no_answer_f1": PERCENT, "no_answer_exact": PERCENT,
        "best_f1": PERCENT, "best_f1_threshold": LOGITS, "best_exact": PERCENT, "best_exact_threshold": LOGITS,
    },
    "race": {"accuracy": FRACTION, "accuracy_middle": FRACTION, "accuracy_high": FRACTION},
    "ner": {"f1": FRACTION, "precision": FRACTION, "recall": FRACTION},
    "classify": {"accuracy": FRACTION, "macro_f1": FRACTION},
    "multi30k-en-de": _BLEU, "multi30k-de-en": _BLEU, "wmt14-en-de": _BLEU, "wmt14-de-en": _BLEU,
    "cnn_dm": _ROUGE, "xsum": _ROUGE,
    "pairs": {"exact_match": PERCENT} | _BLEU | _ROUGE,
}  # fmt: skip

# Values that come from a run's own metrics.jsonl and config.yaml.
RUN = {"val_loss": NATS, "best_val_loss": NATS, "parameters": COUNT}

# GLUE's score (Wang et al., arXiv:1804.07461, section 3): the mean over the tasks; a task with two metrics or two dev sets
# counts with their mean. WNLI is left out, as in Devlin et al. and in Raffel et al. (arXiv:1910.10683, section 2.3).
AVERAGES: dict[str, tuple[str, ...]] = {
    "mrpc_average": ("mrpc_f1", "mrpc_accuracy"),
    "stsb_average": ("stsb_pearson", "stsb_spearman"),
    "qqp_average": ("qqp_f1", "qqp_accuracy"),
    "mnli_average": ("mnli_accuracy", "mnli_accuracy_mismatched"),
    "glue_average": (
        "cola_matthews", "sst2_accuracy", "mrpc_average", "stsb_average", "qqp_average", "mnli_average", "qnli_accuracy",
        "rte_accuracy",
    ),
}  # fmt: skip

# {score: what is missing}, for published scores that a config may expect but no evaluator here measures. All are fractions.
MISSING: dict[str, str] = {
    "hellaswag_acc_norm": "HellaSwag, by the log-likelihoods of its endings divided by their lengths",
    "superglue_average": "the eight tasks of SuperGLUE in words",
    "zeroshot19_accuracy": "the 19 zero-shot tasks of Megatron-DeepSpeed's evaluation harness",
}

# {TASK_METRIC: (task, metric)}
NAMES = {f"{task}_{metric}": (task, metric) for task, metrics in TASKS.items() for metric in metrics}

# {score or task: number of examples in the published test or dev set}. A score is comparable only if its `n` has this value.
SIZES = {
    "wikitext103_word_perplexity": 245_565, "lambada_accuracy": 5_153, "lambada_last_token_accuracy": 5_153,
    "cola": 1_043, "sst2": 872, "mrpc": 408, "stsb": 1_500, "qqp": 40_430, "mnli_accuracy": 9_815,
    "mnli_accuracy_mismatched": 9_832, "qnli": 5_463, "rte": 277, "wnli": 71, "squad": 10_570, "squad2": 11_873,
    "squad2_has_answer_f1": 5_928, "squad2_has_answer_exact": 5_928, "squad2_no_answer_f1": 5_945,
    "squad2_no_answer_exact": 5_945,
}  # fmt: skip

# What the protocol of a score says if the score was not computed on the whole published set.
_PARTS = re.compile(
    r"the first [\d,]+ of [\d,]+ ?\w*|\S* ?has no dev set|[\d,]+ of its [\d,]+ paragraphs are dev|not the published test file"
)


def unit_of(name: str) -> Unit | None:
    """The unit of an `expect` (TASK_METRIC, an average, or a value of the run itself); None for an unknown name."""
    if name in NAMES:
        task, metric = NAMES[name]
        return TASKS[task][metric]
    return FRACTION if name in AVERAGES or name in MISSING else RUN.get(name)


def problems(name: str, value: float) -> Iterator[str]:
    """What is wrong with an `expect`: a name that no evaluator writes, or a value that its unit cannot have."""
    unit = unit_of(name)
    if unit is None:
        names = [*RUN, *NAMES, *AVERAGES, *MISSING]
        close = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {close[0]!r}?" if close else "give TASK_METRIC, for example squad_f1 or val_loss;"
        yield f"expect.{name}: no evaluator writes such a score; {hint} all names: common/evaluation/metrics.py"
    elif unit == FRACTION and 1 < value <= 100:
        yield f"expect.{name}.value={value:g}: is a {unit.name}, from 0 to 1; give {value / 100:g}"
    elif unit == PERCENT and 0 < value <= 1:
        yield f"expect.{name}.value={value:g}: is in {unit.name}, from 0 to 100; give {100 * value:g}"
    elif not unit.least <= value <= unit.most:
        bounds = f"from {unit.least:g} to {unit.most:g}" if unit.most < float("inf") else f"{unit.least:g} or more"
        yield f"expect.{name}.value={value:g}: is outside its unit ({unit.name}, {bounds})"


def row(task: str, metric: str, value: float, n: int, protocol: str) -> dict[str, Any]:
    """One result of eval.json. KeyError for a score that is not in `TASKS`: add it there, with its unit."""
    if metric not in TASKS[task]:
        raise KeyError(f"{task}: {metric} is not in common/evaluation/metrics.py")
    return {"task": task, "metric": metric, "value": value, "n": n, "protocol": protocol}


def not_comparable(name: str, n: int, protocol: str) -> str | None:
    """Why the score TASK_METRIC, computed on n examples, cannot be compared with a published one; None if it can."""
    part = _PARTS.search(protocol)
    if part:
        return part[0]
    size = SIZES.get(name) or SIZES.get(NAMES[name][0])
    return f"n is {n:,}, the published set has {size:,}" if size and n != size else None
