"""What `deepspeed.extra` and `megatron.extra` take: keys that their stack reads in these recipes and that change no loss.

Each key was looked up in the source of deepspeed 0.19.8 and megatron-core 0.19.2. Every other one is refused: most fields of
Megatron's TransformerConfig are read by layers that are not used here, and nothing would say that they had no effect; and
with `round_robin_gradients`, which should change nothing, the losses of ZeRO 1 and 2 part at the second step.
tests/test_extra.py compares the losses, and finds each key in the file that is given for it. Torch-free.
"""

import difflib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from common.errors import shortened


class When(NamedTuple):
    """The settings under which a stack reads a key: as a message says them, and whether a section has them."""

    says: str
    holds: Callable[[Any], bool]


class Key(NamedTuple):
    where: str  # the file that reads it, below megatron/core or deepspeed/runtime
    takes: str  # its values, as a message says them
    is_valid: Callable[[Any], bool]
    when: When = When("", lambda system: True)


def _truth(where: str, when: When) -> Key:
    return Key(where, "true or false", lambda value: isinstance(value, bool), when)


def _whole(where: str, when: When) -> Key:
    """Whole numbers above 0."""
    return Key(where, "a whole number above 0", lambda value: type(value) is int and 1 <= value < 2**50, when)


def granularity(system: Any) -> Any:
    """Which part of a layer Megatron recomputes: 'full', 'selective' or 'none'."""
    return system.extra.get("recompute_granularity", system.recompute)


FULL = When("with full recompute", lambda system: granularity(system) == "full")
SPLIT = When(
    "with full recompute and megatron.tp above 1, without megatron.sequence_parallel",
    lambda system: granularity(system) == "full" and system.tp > 1 and not system.sequence_parallel,
)
SP = When(
    "with megatron.sequence_parallel=true and megatron.tp above 1", lambda system: system.sequence_parallel and system.tp > 1
)
PP = When("with megatron.pp above 1", lambda system: system.pp > 1)
PP_PLAIN = When("with megatron.pp above 1 and megatron.vpp=1", lambda system: system.pp > 1 and system.vpp == 1)
ZERO = When("with deepspeed.zero_stage=1, 2 or 3", lambda system: system.zero_stage > 0)
ONE_STAGE = When(  # a pipeline reduces gradients after the last backward pass
    "with deepspeed.zero_stage=1, 2 or 3 and deepspeed.pp=1", lambda system: system.zero_stage > 0 and system.pp == 1
)
ZERO_12 = When("with deepspeed.zero_stage=1 or 2", lambda system: system.zero_stage in (1, 2))
ZERO_3 = When("with deepspeed.zero_stage=3", lambda system: system.zero_stage == 3)

MEGATRON = {
    # Which activations are kept and which are computed again, by the same operations on the same values. `selective` is the
    # attention alone: of recompute_modules, mlp fills the memory without end, and layernorm needs TransformerEngine.
    "recompute_granularity": Key(
        "transformer/transformer_block.py", "full or selective", lambda value: value in ("full", "selective")
    ),
    "recompute_method": Key("recompute.py", "uniform or block", lambda value: value in ("uniform", "block"), FULL),
    "recompute_num_layers": _whole("recompute.py", FULL),
    # Each tensor-parallel rank keeps its share of the input of a recomputed layer.
    "distribute_saved_activations": _truth("recompute.py", SPLIT),
    # How activations are sent between stages, and whether the sender frees them.
    "batch_p2p_comm": _truth("pipeline_parallel/p2p_communication.py", PP_PLAIN),
    "batch_p2p_sync": _truth("pipeline_parallel/p2p_communication.py", PP),
    "deallocate_pipeline_outputs": _truth("pipeline_parallel/schedules.py", PP_PLAIN),
    # A copy of the embedding's split output, so that the whole one can be freed.
    "clone_scatter_output_in_embedding": _truth("models/common/embeddings/language_model_embedding.py", SP),
}
ZERO_OPTIMIZATION = {
    # How many elements are sent at once, and whether that overlaps with the backward pass.
    "reduce_bucket_size": _whole("zero/stage3.py", ZERO),
    "overlap_comm": _truth("zero/stage3.py", ONE_STAGE),
    "use_multi_rank_bucket_allreduce": _truth("zero/stage_1_and_2.py", ZERO_12),
    # How many elements are stepped at once; which parameters are gathered ahead, and which stay gathered.
    "sub_group_size": _whole("zero/stage3.py", ZERO_3),
    "stage3_prefetch_bucket_size": _whole("zero/stage3.py", ZERO_3),
    "stage3_param_persistence_threshold": _whole("zero/parameter_offload.py", ZERO_3),
    "stage3_model_persistence_threshold": _whole("zero/parameter_offload.py", ZERO_3),
    "stage3_max_live_parameters": _whole("zero/parameter_offload.py", ZERO_3),
    "stage3_max_reuse_distance": _whole("zero/parameter_offload.py", ZERO_3),
    "stage3_allgather_sequential": _truth("zero/partition_parameters.py", ZERO_3),
}
KEYS = {"megatron": MEGATRON, "deepspeed": {f"zero_optimization.{name}": key for name, key in ZERO_OPTIMIZATION.items()}}
TAKES = {
    "megatron": f"megatron.extra takes {', '.join(MEGATRON)}",
    "deepspeed": f"deepspeed.extra takes zero_optimization: {{{', '.join(ZERO_OPTIMIZATION)}}}",
}


def problems(stack: str, system: Any) -> Iterator[str]:
    """What of `extra` in the section of a stack is refused, one line each."""
    for name, value in _flat(system.extra):
        key = KEYS[stack].get(name)
        named = f"{stack}.extra.{shortened(name)}"
        if key is None:
            close = difflib.get_close_matches(name, KEYS[stack], 1, 0.8)
            hint = f"did you mean {close[0]}? " if close else ""
            yield f"{named}: is refused, as it may change the loss or have no effect; {hint}{TAKES[stack]}"
        elif not key.is_valid(value):
            yield f"{named}: must be {key.takes}, is {shortened(repr(value))}"
        elif not key.when.holds(system):
            yield f"{named}: is read only {key.when.says}; leave it out"
    if stack == "megatron":
        yield from _recompute_problems(system)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _recompute_problems(system: Any) -> Iterator[str]:
    """Combinations that TransformerConfig refuses, on every rank and with a traceback."""
    given = system.extra.get("recompute_granularity")
    if given and system.recompute not in ("none", given):
        yield f"megatron.extra.recompute_granularity={given} with megatron.recompute={system.recompute}: give one of them"
    if (
        given == "full"
        and system.recompute == "none"
        and not {"recompute_method", "recompute_num_layers"} <= system.extra.keys()
    ):
        also = "give recompute_method and recompute_num_layers too, or megatron.recompute=full"
        yield f"megatron.extra.recompute_granularity: full has no default for how many layers; {also}"
