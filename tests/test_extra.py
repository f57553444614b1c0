"""`megatron.extra` and `deepspeed.extra`: each key that is taken leaves the losses as they are, and its stack reads it."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, case, losses

from common import config
from common.errors import BadInput
from common.stacks import extra
from recipes.bert import task as bert
from recipes.gpt import task as gpt
from recipes.t5 import task as t5

LOSS = 1e-5  # invariant 1
TASKS = {"gpt": gpt, "bert": bert, "t5": t5}
# {layout: (stack, its overrides, [values of extra that are unlike the defaults])}; all on two ranks
LAYOUTS: dict[str, tuple[str, list[str], list[str]]] = {
    "pp2": (
        "megatron",
        ["megatron.pp=2"],
        ["batch_p2p_comm: false", "batch_p2p_sync: false", "deallocate_pipeline_outputs: true"],
    ),
    "tp2_sp": (
        "megatron",
        ["megatron.tp=2", "megatron.sequence_parallel=true"],
        ["clone_scatter_output_in_embedding: false", "recompute_granularity: selective"],
    ),
    "tp2_recompute": (
        "megatron",
        ["megatron.tp=2", "megatron.recompute=true"],
        ["distribute_saved_activations: true", "recompute_num_layers: 3", "recompute_method: block"],
    ),
    "dp2": (
        "megatron",
        [],
        [
            "recompute_granularity: full, recompute_method: block, recompute_num_layers: 2",
            "recompute_granularity: selective",
        ],
    ),
    "zero1": (
        "deepspeed",
        ["deepspeed.zero_stage=1"],
        [
            "reduce_bucket_size: 9000", "overlap_comm: true", "use_multi_rank_bucket_allreduce: false",
        ],
    ),
    "zero2": (
        "deepspeed",
        ["deepspeed.zero_stage=2"],
        [
            "reduce_bucket_size: 9000", "overlap_comm: true", "use_multi_rank_bucket_allreduce: false",
        ],
    ),
    "zero3": (
        "deepspeed",
        ["deepspeed.zero_stage=3"],
        [
            "reduce_bucket_size: 9000", "overlap_comm: false", "sub_group_size: 9000", "stage3_prefetch_bucket_size: 100",
            "stage3_param_persistence_threshold: 10", "stage3_model_persistence_threshold: 10",
            "stage3_max_live_parameters: 5000", "stage3_max_reuse_distance: 100", "stage3_allgather_sequential: true",
        ],
    ),
}  # fmt: skip


def override(stack: str, values: str) -> str:
    return f"megatron.extra={{{values}}}" if stack == "megatron" else f"deepspeed.extra={{zero_optimization: {{{values}}}}}"


def every_row(family: str) -> dict[str, list[str]]:
    """{layout: values of extra}: each by itself."""
    return {name: values for name, (*_, values) in LAYOUTS.items() if (family, name) != ("t5", "pp2")}


def compare(drive, out: Path, family: str, rows: dict[str, list[str]], settings: list[str]) -> None:
    """Train each layout with and without extra; the losses must be the same."""
    cases = []
    for name, values in rows.items():
        stack, layout, _ = LAYOUTS[name]
        given = [*settings, "train.steps=5", *layout]
        cases.append(case(stack, "tiny", out / name / "plain", given, family=family))
        cases += [
            case(stack, "tiny", out / name / str(n), [*given, override(stack, value)], family=family)
            for n, value in enumerate(values)
        ]
    drive(cases, 2)
    for name, values in rows.items():
        plain = losses(out / name / "plain")
        for number, value in enumerate(values):
            lines = losses(out / name / str(number))
            assert sorted(lines) == sorted(plain) == list(range(1, 6))
            assert max(abs(lines[step]["loss"] - plain[step]["loss"]) for step in plain) <= LOSS, (name, value)


def test_no_key_changes_the_loss(drive, settings, tmp_path: Path) -> None:
    """All keys of a layout at once; the others take the long way below."""
    rows = {name: [", ".join(values)] for name, values in every_row("gpt").items() if name not in ("dp2", "tp2_sp", "zero1")}
    compare(drive, tmp_path, "gpt", rows, settings)


@pytest.mark.slow
@pytest.mark.parametrize("family", TASKS)
def test_each_key_changes_no_loss(drive, settings, bert_settings, t5_settings, tmp_path: Path, family: str) -> None:
    given = {"gpt": settings, "bert": bert_settings, "t5": t5_settings}[family]
    compare(drive, tmp_path, family, every_row(family), given)


def test_every_key_is_tried() -> None:
    tried = {stack: set() for stack in extra.KEYS}
    for stack, _, values in LAYOUTS.values():
        tried[stack] |= {key for value in values for key in re.findall(r"(\w+):", value)}
    assert tried == {"megatron": set(extra.MEGATRON), "deepspeed": set(extra.ZERO_OPTIMIZATION)}


@pytest.mark.parametrize("stack", extra.KEYS)
def test_its_stack_reads_each_key_where_it_is_said_to(stack: str) -> None:
    """Without an import: the source alone."""
    [package] = find_spec("megatron" if stack == "megatron" else "deepspeed").submodule_search_locations
    folder = Path(package) / ("core" if stack == "megatron" else "runtime")
    for name, key in extra.KEYS[stack].items():
        field = name.rpartition(".")[2].removeprefix("stage3_")
        pattern = rf"config\.{field}\b" if stack == "megatron" else rf"\b{field}\b"
        assert re.search(pattern, (folder / key.where).read_text()), name


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize(
    ("stack", "values"),
    [
        ("megatron", "window_size: [8, 8]"), ("megatron", "num_moe_experts: 2"), ("megatron", "qk_layernorm: true"),
        ("megatron", "softmax_scale: 0.5"), ("megatron", "hidden_dropout: 0.5"), ("megatron", "params_dtype: float16"),
        ("megatron", "recompute_modules: [mlp]"),
        ("megatron", "use_cpu_initialization: true"), ("deepspeed", "stage: 0"), ("deepspeed", "allgather_partitions: false"),
        ("deepspeed", "round_robin_gradients: true"),
    ],
)  # fmt: skip
def test_what_changes_the_loss_or_is_not_read_is_refused(family: str, stack: str, values: str) -> None:
    with pytest.raises(BadInput) as refused:
        config.load(ROOT / f"recipes/{family}/configs/tiny.yaml", [override(stack, values)], TASKS[family].Config)
    [line] = refused.value.problems
    named = f"{stack}.extra.{'zero_optimization.' if stack == 'deepspeed' else ''}{values.partition(':')[0]}: is refused"
    assert named in line and f"{stack}.extra takes " in line
