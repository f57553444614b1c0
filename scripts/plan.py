"""What a config needs on each stack and layout, before anything is started: memory per GPU, tokens, FLOPs, days.

python -m scripts.plan CONFIG [--gpus N] [--gpu NAME] [a.b=c ...]
python -m scripts.plan --validate    predicted step times beside published ones; writes docs/planner.md
"""

import argparse
from collections.abc import Iterator, Sequence

from common import config, families
from common.config import Config
from common.errors import BadInput, exit_cleanly
from common.layout import layout_for
from common.paths import ROOT
from common.planning import flops, memory
from common.planning.hardware import gpu
from common.preflight import task_module
from common.yaml_files import read_yaml

COLUMNS = {"gradients": "grads", "optimizer": "optim", "activations": "activ", "total": "peak"}  # shorter names of parts
CARDS = {"40 GB": "A100-40GB", "80 GB": "H100", "141 GB": "H200"}
ASSUMED_MFU = 0.4  # what well-tuned dense models reach on A100 and H100 (arXiv:2205.05198; Megatron-LM's README)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.plan", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default: 8)")
    parser.add_argument("--gpu", help="GPU model, to estimate the days of training: A100, H100, 'H100 PCIe', ...")
    parser.add_argument("--validate", action="store_true", help="print and write docs/planner.md")
    args = parser.parse_intermixed_args()
    if args.validate:
        return validate()
    if args.config is None:
        raise BadInput("scripts.plan: give a config, such as recipes/gpt/configs/gpt3_1.3b.yaml, or --validate")
    if args.gpus < 1:
        raise BadInput(f"--gpus {args.gpus}: must be 1 or more")
    peak = flops.peak_tflops(args.gpu)
    if args.gpu and peak is None:
        raise BadInput(f"--gpu {args.gpu}: its peak is unknown; common/planning/flops.py has the table (A100, H100, L4, ...)")

    task = task_module(families.of_config(args.config), read_yaml(args.config))
    cfg = config.load(args.config, args.overrides, task.Config)
    if cfg.model.vocab_size is None:
        raise BadInput(f"{args.config}: gives no model.vocab_size (the tokenizer decides); add model.vocab_size=N")
    cfg = config.resolve(cfg, task.ResolvedConfig, None)
    model = cfg.model

    print(f"parameters     {model.parameter_count():,}")
    begin, in_all, flops_in_all = 0, 0, 0.0
    for phase in config.views(cfg):
        per_token = task.forward_backward_flops(model, phase.data)
        tokens = phase.train.global_batch * phase.data.sample_tokens
        steps, begin = phase.train.steps - begin, phase.train.steps
        in_all, flops_in_all = in_all + tokens * steps, flops_in_all + tokens * steps * per_token["full"]
        causal = f" ({per_token['causal']:.4g} counting the causal half of attention)" if "causal" in per_token else ""
        print(f"FLOPs/token    {per_token['full']:.4g}{causal}")
        product = f"{phase.train.global_batch} x {phase.data.sample_tokens} = {tokens:,}"
        print(f"tokens/step    {product}; in {steps:,} steps {tokens * steps:.4g}")
    print(f"in all         {in_all:.4g} tokens, {flops_in_all:.4g} FLOPs")
    if peak:
        seconds = flops_in_all / (ASSUMED_MFU * peak * 1e12 * args.gpus)
        speed = f"{ASSUMED_MFU:.0%} of {peak:g} TFLOP/s"
        print(f"time           {seconds / 86400:.3g} days if {args.gpus} x {args.gpu} reach {speed}")
    views = config.views(cfg)
    for number, phase in enumerate(views, 1):
        which = f", phase {number} ({phase.data.seq_len} tokens per sample)" if len(views) > 1 else ""
        print(f"\nGB (10^9 bytes) on each of {args.gpus} GPUs, by common/planning/memory.py{which}; *: the config's own layout")
        table(phase, args.gpus, families.stacks(families.of_config(args.config)))


def validate() -> None:
    """Print predicted step times beside published ones, and write them to docs/planner.md."""
    from common.planning import validation

    page = validation.page()
    print(page)
    (ROOT / "docs/planner.md").write_text(page, encoding="utf-8")


def table(cfg: Config, gpus: int, stacks: Sequence[str]) -> None:
    """Print a row for each layout of these stacks: what each part takes on a GPU at the peak, what it needs beside it, and on
    which GPU all of it fits."""
    parts = {part: COLUMNS.get(part, part) for part in (*memory.PARTS, "total", *memory.BESIDE, "required")}
    width = {part: max(8, len(name) + 2) for part, name in parts.items()}
    columns = f"{'layout':<40} micro accum" + "".join(f"{name:>{width[part]}}" for part, name in parts.items())
    print(columns + "".join(f"{size:>7}" for size in CARDS))
    for layout, stack, changed in layouts(cfg, stacks):
        try:
            shared = layout_for(changed, stack, gpus)
        except BadInput as error:
            if layout.startswith("*"):
                print(f"{layout:<40} cannot: {error.problems[0]}")
            continue  # the other rows are examples: a layout that does not divide the GPUs or the batch is left out
        estimate = memory.estimate_for(changed, cfg.model, stack, gpus)
        row = f"{layout:<40} {shared.micro_batch:>5} {shared.accumulate:>5}"
        row += "".join(f"{estimate[part] / 1e9:>{width[part]}.2f}" for part in parts)
        print(row + "".join(f"{'fits' if estimate['required'] <= gpu(name).memory else '-':>7}" for name in CARDS.values()))


def layouts(cfg: Config, stacks: Sequence[str]) -> Iterator[tuple[str, str, Config]]:
    """(name, stack, config with that layout) of the config's own layout, then of the usual layouts of each stack."""
    for stack in stacks:
        yield f"* {name_of(cfg, stack)}", stack, cfg
        for change in CHOICES[stack]:
            system = getattr(cfg, stack).model_copy(update=change)
            changed = cfg.model_copy(update={stack: system})
            if system != getattr(cfg, stack):
                yield f"  {name_of(changed, stack)}", stack, changed


def _megatron(tp: int, pp: int) -> dict[str, object]:
    return {"tp": tp, "pp": pp, "sequence_parallel": tp > 1, "distributed_optimizer": True}


CHOICES: dict[str, list[dict[str, object]]] = {
    "baseline": [{"recompute": False}, {"recompute": True}],
    "deepspeed": [{"zero_stage": s, "offload": o} for s, o in ((1, False), (2, False), (3, False), (3, True))],
    "megatron": [_megatron(tp, pp) for tp, pp in ((1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (8, 8))],
}
SHORT = {"sequence_parallel": "sp", "distributed_optimizer": "dist-opt", "zero_stage": "zero", "recompute": "recompute"}


def name_of(cfg: Config, stack: str) -> str:
    """'megatron tp=2 sp dist-opt'"""
    values = getattr(cfg, stack).model_dump(exclude={"micro_batch", "extra"})
    words = []
    for key, value in values.items():
        if value is True:
            words.append(SHORT.get(key, key))
        elif key == "zero_stage" or value not in (None, False, 1):
            words.append(f"{SHORT.get(key, key)}={value}")
    return " ".join([stack, *words])


if __name__ == "__main__":
    exit_cleanly(main)
