"""What articles on DeepSpeed and Megatron claim: who said it first, when, on which hardware, and what is true today.

`python -m scripts.document_claims` writes docs/claims.md from it.
"""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.comparison.figures import Figure, Options, Picture, Task
from common.comparison.render import cell

SECTION = "Claims"
Reference = tuple[str, str, str]  # (section, subject, metric) of a figure of the report; "": all of them


class Claim(NamedTuple):
    name: str  # a row of the report
    says: str  # the claim, in our words
    origin: str  # who said it first
    when: str  # YYYY-MM-DD as far as it is known, or "not found"
    hardware: str  # that it was measured on; "none": it is no measurement
    verdict: str  # today: true, half true, not today, contradicted, no source, false
    why: str
    sources: str  # with their dates
    ours: tuple[Reference, ...] = ()  # figures of the report that answer it; none: not run here
    link: str = ""  # a page of docs/ that answers it


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "NVIDIA made DeepSpeed",
        "DeepSpeed was first developed by NVIDIA.",
        "articles; we found no source", "not found", "none", "false",
        "Microsoft did. Since 2025 DeepSpeed belongs to the PyTorch Foundation. NVIDIA's own library is Megatron.",
        "git history of deepspeedai/DeepSpeed, commit 461495e of 2020-01-23; PyTorch Foundation, press release of 2025-05-07",
        (("Ecosystem / The projects", "begun by", "deepspeed"),),
    ),
    Claim(
        "Meta made Megatron",
        "Megatron was developed by Meta AI.",
        "articles; we found no source", "not found", "none", "false",
        "NVIDIA did. What may have been meant is Megatron-11b, a model in Facebook's fairseq; that is our guess.",
        "git history of NVIDIA/Megatron-LM, commit fb4cbdc of 2019-03-27, from an nvidia.com address; fairseq, "
        "examples/megatron_11b",
        (("Ecosystem / The projects", "begun by", "megatron"),),
    ),
    Claim(
        "TensorFlow and Keras",
        "DeepSpeed works with TensorFlow and Keras too.",
        "articles; we found no source", "not found", "none", "false",
        "Its requirements name torch. No Python file of DeepSpeed or of Megatron imports tensorflow or keras; a test looks.",
        "deepspeed 0.19.8 and megatron-core 0.19.2, as installed, 2026",
        (
            ("Ecosystem / Installed packages", "TensorFlow or Keras", "deepspeed"),
            ("Ecosystem / Installed packages", "TensorFlow or Keras", "megatron"),
        ),
    ),
    Claim(
        "30 % faster on BERT",
        "DeepSpeed trains models of BERT's size 30 % faster than the baseline.",
        "the DeepSpeed team", "2020-05-19", "one V100", "not today",
        "More than 30 %, 66 TFLOP/s, was the gain of fused transformer kernels over the kernels of that day. torch's own "
        "scaled_dot_product_attention came later, and both stacks use it here.",
        "deepspeed.ai, 2020-05-19, fastest BERT training",
        (("Performance / BERT, best", "deepspeed", "ratio"),),
    ),
    Claim(
        "3x the state of the art",
        "Megatron is up to three times faster than the state of the art before it.",
        "nobody that we found", "not found", "none", "no source",
        "Megatron-LM's README never had such a sentence. The nearest is a claim of Microsoft's against Megatron: with ZeRO, "
        "Turing-NLG trained with three times the throughput of Megatron alone, on 256 GPUs.",
        "git log -S over NVIDIA/Megatron-LM, 2026-08; Microsoft Research, Turing-NLG, 2020-02, read in a copy",
        (("Performance / GPT, best", "megatron", "ratio"),),
    ),
    Claim(
        "10x Megatron",
        "ZeRO trains ten times faster than Megatron's tensor parallelism.",
        "the DeepSpeed team, in a tutorial", "not dated", "400 V100, a slow network between nodes", "half true",
        "True where tensor parallelism has to cross nodes. With tensor parallelism inside a node and pipelines between nodes, "
        "PTD-P measured the opposite on the same A100s at a fixed batch: ZeRO 3 slows down as GPUs are added, PTD-P loses 8 %.",
        "DeepSpeed, docs/_tutorials/megatron.md, read 2026-08; arXiv:2104.04473, table 2, 2021",
        (("Scalability / PTD-P, table 2, A100", "", ""),),
        "planner.md",
    ),
    Claim(
        "pipelines balance well",
        "DeepSpeed's pipeline balances the load well.",
        "the DeepSpeed team, in a tutorial", "not dated", "none", "half true",
        "It divides layers by parameters, by their type or evenly, and none of these weighs a loss over a large vocabulary: in "
        "our example only a list of layers loads both stages alike. Megatron divides evenly unless it is given a layout.",
        "DeepSpeed, docs/_tutorials/pipeline.md, read 2026-08; megatron-core 0.19.2, transformer_config.py",
        (("Load balance / Stages", "", ""),),
        "layouts.md#the-stages-of-deepspeeds-pipeline",
    ),
    Claim(
        "Megatron is simpler",
        "Megatron has the simpler interface.",
        "articles; we found no source", "not found", "none", "contradicted",
        "Those who integrate it say otherwise: ms-swift calls its barrier high, and accelerate planned to drop it for the cost "
        "of maintenance. Here Megatron takes more lines of its own in every family.",
        "modelscope/ms-swift, documentation, read in 2026; huggingface/accelerate #2390, 2024-01-31",
        (
            ("Ease of use / Lines of a recipe", "gpt deepspeed", "lines in them"),
            ("Ease of use / Lines of a recipe", "gpt megatron", "lines in them"),
            ("Ease of use / Lines for all families", "deepspeed", "for it alone"),
            ("Ease of use / Lines for all families", "megatron", "for it alone"),
        ),
    ),
    Claim(
        "DeepSpeed is for vision",
        "DeepSpeed is for computer vision, and not the best choice for language.",
        "articles; we found no source", "not found", "none", "contradicted",
        "The models that it is known for are language models: its BERT record, Turing-NLG, MT-NLG and BLOOM.",
        "deepspeed.ai, 2020-05-28; arXiv:2201.11990, 2022; arXiv:2211.05100, 2022",
        (("Ecosystem / Checked here", "pretrains", "deepspeed"),),
    ),
    Claim(
        "Megatron is for language",
        "Megatron is limited to language models.",
        "articles; we found no source", "not found", "none", "half true",
        "Transformers alone, but vision and multimodal ones too: Megatron Core 0.8 added LLaVA's architecture.",
        "NVIDIA/Megatron-LM, CHANGELOG.md, 2025",
        (("Ecosystem / Checked here", "pretrains", "megatron"),),
    ),
)  # fmt: skip


class Comparison(NamedTuple):
    """Both on the same hardware, measured by others."""

    name: str
    hardware: str
    found: str
    source: str


COMPARISONS: tuple[Comparison, ...] = (
    Comparison(
        "PTD-P, 175B and 530B", "A100", "at a fixed batch ZeRO 3 slows down once traffic exceeds compute; PTD-P loses 8 %",
        "arXiv:2104.04473, table 2, 2021; by Megatron's authors, who did not try ZeRO 3 with tensor parallelism",
    ),
    Comparison(
        "530B, two papers", "2,240 to 3,360 A100",
        "DeepSpeed with Megatron 126 to 113 TFLOP/s per GPU, Megatron with interleaved stages 163",
        "arXiv:2201.11990, 2022, and arXiv:2104.04473, 2021",
    ),
    Comparison(
        "Qwen2.5-14B, 8,192 tokens", "8 A800", "Megatron 9.04 s, ZeRO 2 10.32 s, ZeRO 3 10.56 s per step",
        "modelscope/ms-swift, quick start of its Megatron backend, read in 2026",
    ),
    Comparison(
        "22B, 175B and 1T", "Frontier, MI250X", "Megatron-DeepSpeed, both in one: 38.4, 36.1 and 32.0 % of peak",
        "arXiv:2312.12705, 2023",
    ),
)  # fmt: skip


def run(options: Options, folder: Path) -> list[Figure]:
    return [*claims(), *comparisons()]


def claims() -> Iterator[Figure]:
    for claim in CLAIMS:
        values = {
            "said by": claim.origin, "when": claim.when, "on": claim.hardware, "true today": claim.verdict,
            "our figure": ours(claim),
        }  # fmt: skip
        for metric, value in values.items():
            yield Figure(SECTION, claim.name, metric, value, "", "cited", f"{claim.sources}; docs/claims.md")


def comparisons() -> Iterator[Figure]:
    for one in COMPARISONS:
        for metric, value in (("hardware", one.hardware), ("found", one.found)):
            yield Figure(f"{SECTION} / On the same hardware", one.name, metric, value, "", "cited", one.source)


def ours(claim: Claim) -> str:
    """The figures that answer a claim: 'Performance / BERT, best: deepspeed, ratio'."""
    return "; ".join(_written(reference) for reference in claim.ours) or "not run here"


def with_value(reference: Reference, figures: Sequence[Figure]) -> str:
    """'Performance / BERT, best: deepspeed, ratio: 1.03 (measured)'; without a value if the reference is of a whole table."""
    found = [f"{cell(f)} ({f.kind})" for f in figures if [f.section, f.subject, f.metric] == [*reference]]
    return ": ".join([_written(reference), *found])


def _written(reference: Reference) -> str:
    section, *rest = reference
    return f"{section}: {', '.join(filter(None, rest))}" if any(rest) else section


# ---- docs/claims.md

WIDTH = 126
HEAD = """\
# Claims about DeepSpeed and Megatron

Generated by `python -m scripts.document_claims` from [common/comparison/claims.py](../common/comparison/claims.py).

Articles that compare the two repeat the claims below, in these or other words. For each: who said it first, when and on which
hardware, whether it is true today, and which figure of ours answers it. "Not found" says that we looked and found nothing. Our
figures are those of the report in [comparison.md](comparison.md), by table, row and column. What it measures, it measures on
CPU cores: that does not test a claim about GPUs. The files were read in August to November 2026:
```bash
python -m scripts.benchmark --parts ease_of_use ecosystem claims --out out/benchmark
```
"""
NAMES = """\
Two claims confuse who made what. **DeepSpeed is Microsoft's**, now a project of the PyTorch Foundation; **Megatron is
NVIDIA's**. Neither supports TensorFlow or Keras: both are libraries for PyTorch.
"""
SAME = """\
## Both on the same hardware, by others

We found no independent study of 2023 to 2026 that runs current DeepSpeed and current Megatron Core on equal terms. These come
closest:
"""


def page(figures: Sequence[Figure] = ()) -> str:
    """docs/claims.md, with the values that a report gives to our figures."""
    parts = [HEAD, NAMES]
    for claim in CLAIMS:
        answers = [with_value(reference, figures) for reference in claim.ours] or ["not run here"]
        answers = [*answers, *([f"[docs/{claim.link.partition('#')[0]}]({claim.link})"] if claim.link else [])]
        points = (
            f"Said first by: {claim.origin}. When: {claim.when}. Hardware: {claim.hardware}.",
            f"Sources: {claim.sources}.",
            f"Our figure: {'; '.join(answers)}.",
        )
        items = "\n".join(textwrap.fill(point, WIDTH, initial_indent="- ", subsequent_indent="  ") for point in points)
        heading = f"## {claim.name[0].upper()}{claim.name[1:]}: {claim.verdict}"
        parts.append(f"{heading}\n\n> {claim.says}\n\n{textwrap.fill(claim.why, WIDTH)}\n\n{items}\n")
    rows = [f"| {one.name} | {one.hardware} | {one.found} | {one.source} |" for one in COMPARISONS]
    return "\n".join([*parts, SAME, "| what | hardware | found | source |", "|---|---|---|---|", *rows, ""])


TASKS: tuple[Task, ...] = (Task("claims", SECTION, 1, run),)
PICTURES: tuple[Picture, ...] = ()
