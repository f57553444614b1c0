"""Proof that a model, a checkpoint or an export has the parameters that the family lists: the same names, the same full shapes.

A parameter that a stack does not build, or that nothing fills, changes the function without an error: the losses stay
plausible. Each stack proves its set before the first step, over all pipeline stages and shards together.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from common.contract import Family
from common.errors import BadInput

Shapes = Mapping[str, Sequence[int]]  # full shape by Hugging Face name


def expected(model: Any, task: Family) -> dict[str, tuple[int, ...]]:
    """The family's list for a resolved model, `task.parameter_shapes`; BadInput if `model.parameter_count()`, which the log,
    the model card and the memory estimate quote, differs from its sum."""
    shapes = task.parameter_shapes(model)
    count, total = model.parameter_count(), sum(map(prod, shapes.values()))
    if count != total:
        raise BadInput(
            f"Model.parameter_count of {task.__name__} counts {count:,} parameters and task.parameter_shapes lists "
            f"{total:,}; correct the one that is wrong"
        )
    return shapes


LIST = "task.parameter_shapes"


def prove(actual: Shapes, shapes: Shapes, where: str, listed_by: str = LIST) -> None:
    """BadInput unless `actual` has the names and full shapes of the list `shapes`. where: what has these parameters, for
    example 'out/run/step_20' or 'the model on megatron'."""
    problems = differences(actual, shapes, listed_by)
    if problems:
        raise BadInput([f"{where}: {problem}" for problem in problems])


def differences(actual: Shapes, shapes: Shapes, listed_by: str = LIST) -> list[str]:
    """At most one line each for names that are missing, names that are unknown, and other shapes."""
    problems = []
    missing = [name for name in shapes if name not in actual]
    unknown = [name for name in actual if name not in shapes]
    reshaped = [name for name in actual if name in shapes and tuple(actual[name]) != tuple(shapes[name])]
    if missing:
        problems.append(f"{_some(missing)} is missing; {listed_by} has it")
    if unknown:
        problems.append(f"{_some(unknown)} is unknown; {listed_by} does not have it")
    if reshaped:
        name = reshaped[0]
        problems.append(f"{_some(reshaped)} has shape {tuple(actual[name])}; in {listed_by} it is {tuple(shapes[name])}")
    return problems


def _some(names: Sequence[str]) -> str:
    """'model.norm.weight (and 7 more)'"""
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
