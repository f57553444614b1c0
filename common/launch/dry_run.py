"""What --dry-run prints: the resolved config, its size, its memory and the command that would be started."""

import shlex
from collections.abc import Sequence

from common.contract import Family
from common.errors import BadInput
from common.planning import memory
from common.preflight import Run
from common.yaml_files import to_yaml


def describe(run: Run, task: Family, command: Sequence[str]) -> str:
    """The text of --dry-run for a run that `preflight.prepare` has checked."""
    model, layout, cfg = run.cfg.model, run.layout, run.cfg
    flops = task.forward_backward_flops(model, cfg.data)
    causal = f" ({flops['causal']:.4g} counting the causal half only)" if "causal" in flops else ""
    lines = [to_yaml(run.whole.dump()).rstrip(), ""]
    lines += [f"note: {note}" for note in run.notes]
    lines += [
        f"parameters        {model.parameter_count():,}",
        f"FLOPs per token   {flops['full']:.4g} forward and backward{causal}",
        f"tokens per step   {cfg.train.global_batch} x {cfg.data.sample_tokens} = {run.tokens_per_step:,}",
        f"layout            {run.stack}: {layout.shares}",
        f"memory per rank   {_memory(run)}",
        f"continues from    {run.resume.path if run.resume else 'nothing: a new run'}",
        f"command           {shlex.join(command)}",
    ]
    return "\n".join(lines)


def _memory(run: Run) -> str:
    """All that a GPU needs, by part, and what is in CPU memory; or why that is not known."""
    try:
        estimate = memory.estimate_for(run.cfg, run.cfg.model, run.stack, run.layout.world)
    except BadInput as error:
        return str(error)
    parts = (*memory.PARTS, *memory.BESIDE, "host")
    text = "  ".join(f"{name} {estimate[name] / 2**30:.2f}" for name in parts if estimate[name])
    return f"{estimate['required'] / 2**30:.2f} GiB estimated ({text})"
