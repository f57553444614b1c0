"""Measure the speed of a recipe's step, compared with a minimal loop on its own stack and with plain PyTorch and transformers.

    python -m scripts.bench_speed [--stacks S ...] [--steps N] [--threads N] [--out FILE]

There is one process per stack, on the GPU if there is one. It runs the recipe's own pretrain.py. Before each step of the recipe
the other loops make one step on the same samples, so that drift of the machine affects all loops equally. The result is the
median over the rounds of (the other loop's time / the recipe's time in that round): 1.00 is equal, and below 1 the recipe is
slower. The recipe's time includes all that it does between two steps: reading the samples, the update, the log line,
metrics.jsonl and TensorBoard. The other loops get their batch as tensors and log nothing.

  minimal   a loop written by hand on the same stack, with the same AdamW kernel
  bare      transformers' GPT2LMHeadModel and torch.optim.AdamW with their defaults
  tuned     bare, with two choices of the recipes: AdamW(fused=True), and GELU in one kernel
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data.indexed_dataset import IndexedDatasetWriter, write_manifest
from common.launch import processes

if TYPE_CHECKING:
    import torch

    from common.preflight import Run

ROOT = Path(__file__).resolve().parents[1]
STACKS = ("baseline", "deepspeed", "megatron")
# The shape for which the goals hold: GPT-2 style, 6 x 384, 256 tokens, global batch 8 = one micro batch, fp32.
SHAPE = {"layers": 6, "hidden": 384, "heads": 6, "seq_len": 256, "batch": 8, "vocab": 4096}
GOALS = {
    "baseline": {"minimal": 0.97},
    "deepspeed": {"minimal": 0.97, "bare": 0.90},
    "megatron": {"minimal": 0.97, "bare": 0.95},
}
WARMUP = 3  # rounds

Step = Callable[["torch.Tensor", "torch.Tensor"], float]  # inputs (B, T), targets (B, T) -> loss


def write_corpus(prefix: Path, tokens: int, vocab: int, document: int = 1000) -> None:
    """Write a synthetic corpus in which few ids are frequent and most are rare, so that a model can learn something."""
    rng = np.random.default_rng(0)
    writer = IndexedDatasetWriter(prefix, np.uint16 if vocab <= 2**16 else np.int32)
    for _ in range(-(-tokens // document)):
        writer.add((rng.random(document) ** 4 * vocab).astype(np.int64))
    writer.finish()
    write_manifest(prefix, {"tokenizer_size": vocab})


def config(shape: dict[str, int], corpus: Path) -> dict[str, Any]:
    """The recipe's config for this shape. It differs from tiny.yaml only in size."""
    system = {"micro_batch": shape["batch"]}
    return {
        "model": {"arch": "gpt2", "vocab_size": shape["vocab"]} | {k: shape[k] for k in ("layers", "hidden", "heads")},
        "data": {"train": str(corpus), "seq_len": shape["seq_len"]},
        "optim": {"lr": 3e-4, "warmup_steps": 10, "weight_decay": 0.1, "betas": [0.9, 0.95], "grad_clip": 1.0},
        "train": {"steps": 1_000_000, "global_batch": shape["batch"], "dtype": "fp32"},
        "baseline": system,
        "deepspeed": system | {"zero_stage": 1},
        "megatron": system,
    }  # fmt: skip


# ---- the other loops -------------------------------------------------------------------------------------------------


def adamw(net: "torch.nn.Module", run: "Run", fused: bool | None) -> "torch.optim.AdamW":
    import torch

    o = run.cfg.optim
    matrices, others = [p for p in net.parameters() if p.dim() > 1], [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, fused=fused)


def cross_entropy(logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
    """logits (B, T, V), targets (B, T) -> mean"""
    import torch.nn.functional as F

    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def bare(run: "Run", ranks: processes.Ranks, tuned: bool = False) -> Step:
    import torch
    from transformers import GPT2LMHeadModel

    from recipes.gpt import task

    net = task.hf_model(run.cfg.model) if tuned else GPT2LMHeadModel(task.hf_config(run.cfg.model))
    net = net.to(ranks.device).train()
    optimizer = adamw(net, run, fused=tuned or None)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> float:
        loss = cross_entropy(net(input_ids=inputs).logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), run.cfg.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def minimal_baseline(run: "Run", ranks: processes.Ranks) -> Step:
    import torch
    from accelerate import Accelerator

    from recipes.gpt import task

    accelerator = Accelerator(cpu=ranks.device.type == "cpu")
    net = task.hf_model(run.cfg.model)
    model, optimizer = accelerator.prepare(net.train(), adamw(net, run, fused=True))

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> float:
        loss = cross_entropy(model(input_ids=inputs).logits, targets)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), run.cfg.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def minimal_deepspeed(run: "Run", ranks: processes.Ranks) -> Step:
    import deepspeed
    import torch

    from recipes.gpt import task

    net = task.hf_model(run.cfg.model)
    ds_config = {
        "train_micro_batch_size_per_gpu": run.layout.micro_batch, "gradient_clipping": run.cfg.optim.grad_clip,
        "zero_optimization": {"stage": run.cfg.deepspeed.zero_stage}, "steps_per_print": 10**9,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=net, optimizer=adamw(net, run, fused=True), config=ds_config)
    engine.train()

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> float:
        loss = cross_entropy(engine(input_ids=inputs).logits, targets)
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def minimal_megatron(run: "Run", ranks: processes.Ranks) -> Step:
    import torch
    import torch.nn.functional as F
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from common.stacks import cuda_stand_in, mcore

    m, o = run.cfg.model, run.cfg.optim
    shape = TransformerConfig(
        num_layers=m.layers, hidden_size=m.hidden, num_attention_heads=m.heads, hidden_dropout=0.0, attention_dropout=0.0,
        activation_func=partial(F.gelu, approximate="tanh"), finalize_model_grads_func=finalize_model_grads,
        use_cpu_initialization=True, masked_softmax_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    mcore.use_own_norms()
    net = GPTModel(
        config=shape, transformer_layer_spec=mcore.layer_spec(AttnMaskType.causal), vocab_size=m.vocab_size,
        max_sequence_length=m.positions, share_embeddings_and_output_weights=True,
    )  # fmt: skip
    with cuda_stand_in.active(ranks):
        model = DistributedDataParallel(shape, DistributedDataParallelConfig(), net.to(ranks.device))
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=o.lr, weight_decay=o.weight_decay, adam_beta1=o.betas[0], adam_beta2=o.betas[1],
                adam_eps=o.eps, clip_grad=o.grad_clip,
            ),
            [model],
        )  # fmt: skip
    for group in optimizer.param_groups:
        group["fused"] = True  # the same kernel as the recipe's
    schedule = get_forward_backward_func()
    positions = torch.arange(run.cfg.data.seq_len, device=ranks.device).expand(run.layout.micro_batch, -1)  # (B, T)

    def forward(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        inputs, targets = next(batches)

        def loss_of(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            mean = losses.mean()
            return mean, {"loss": mean.detach().clone()}

        return model(inputs, positions, None, labels=targets), loss_of

    model.train()

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        with cuda_stand_in.active(ranks):
            outputs = schedule(
                forward_step_func=forward, data_iterator=iter([(inputs, targets)]), model=[model], num_microbatches=1,
                seq_length=run.cfg.data.seq_len, micro_batch_size=run.layout.micro_batch, forward_only=False,
            )  # fmt: skip
            optimizer.step()
        return outputs[0]["loss"].item()

    return step


MINIMAL = {"baseline": minimal_baseline, "deepspeed": minimal_deepspeed, "megatron": minimal_megatron}


# ---- measuring -------------------------------------------------------------------------------------------------------


class Enough(Exception):
    """All rounds are done."""


class Rounds:
    """The seconds and losses of every step, by the name of the loop."""

    def __init__(self, stack: str, rounds: int):
        self.stack, self.rounds = stack, rounds
        self.seconds: dict[str, list[float]] = {}
        self.losses: dict[str, list[float]] = {}
        self.others: dict[str, Step] | None = None
        self.step_start = 0.0

    def before_step(self, run: "Run", device: "torch.device") -> None:
        """End the recipe's last step, let each other loop make one step, and begin the recipe's next step."""
        import torch

        if self.others is None:
            ranks = processes.Ranks(0, 1, device)
            minimal = MINIMAL[self.stack](run, ranks)
            self.others = {"minimal": minimal, "bare": bare(run, ranks), "tuned": bare(run, ranks, tuned=True)}
        else:
            self._add("recipe", self._clock(device) - self.step_start, None)
        done = len(self.seconds.get("recipe", []))
        if done == self.rounds:
            raise Enough
        tokens = torch.from_numpy(run.train.collate(run.samples(done + 1))["tokens"]).to(device)  # (B, T + 1)
        order = list(self.others) if done % 2 else list(self.others)[::-1]
        for name in order:
            start = self._clock(device)
            loss = self.others[name](tokens[:, :-1], tokens[:, 1:])
            self._add(name, self._clock(device) - start, loss)
        self.step_start = self._clock(device)

    def _add(self, name: str, seconds: float, loss: float | None) -> None:
        self.seconds.setdefault(name, []).append(seconds)
        self.losses.setdefault(name, []).extend([] if loss is None else [loss])

    @staticmethod
    def _clock(device: "torch.device") -> float:
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)
        return time.perf_counter()


def measure(stack: str, shape: dict[str, int], steps: int, threads: int | None) -> dict[str, Any]:
    """Run one recipe with the other loops in between. A process can call this only once."""
    processes.quiet()
    import torch

    if threads:
        torch.set_num_threads(threads)
    recipe = importlib.import_module(f"recipes.gpt.{stack}.pretrain")
    rounds = Rounds(stack, WARMUP + steps)

    class Interleaved(recipe.Log):
        def begin_step(self) -> None:
            rounds.before_step(self.run, self.device)
            super().begin_step()

        def step(self, step: int, loss: float, *values: Any, **parts: float) -> None:
            super().step(step, loss, *values, **parts)
            rounds.losses.setdefault("recipe", []).append(loss)

    recipe.Log = Interleaved
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = (WARMUP + steps) * shape["batch"] + 1
        write_corpus(folder / "corpus", samples * shape["seq_len"] + 1, shape["vocab"])
        (folder / "config.yaml").write_text(json.dumps(config(shape, folder / "corpus")), encoding="utf-8")
        try:
            recipe.main([str(folder / "config.yaml"), str(folder / "out")])
        except Enough:
            pass
        lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = {name: values[WARMUP:] for name, values in rounds.seconds.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "stack": stack, "device": device, "torch": torch.__version__, "steps": steps, "shape": shape,
        "ratio": {k: ratio(v, seconds["recipe"]) for k, v in seconds.items() if k != "recipe"},
        "ms": {k: statistics.median(v) * 1e3 for k, v in seconds.items()},
        "seconds": seconds,
        "metrics_ms": statistics.median(line["ms"] for line in lines[WARMUP:]),
        "loss": {k: [v[0], v[-1]] for k, v in rounds.losses.items()},
    }  # fmt: skip


def ratio(other: Sequence[float], recipe: Sequence[float]) -> float:
    """The speed of the recipe relative to the other loop: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(other, recipe, strict=True))


def missed(result: dict[str, Any]) -> list[str]:
    """The goals that a result does not reach, one line each."""
    stack, ratios = result["stack"], result["ratio"]
    goals = GOALS[stack].items()
    return [f"{stack}: {ratios[name]:.3f} of {name}, goal {goal}" for name, goal in goals if ratios[name] < goal]


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = ["| recipe | device | of minimal | of bare | of tuned | ms/step |", "|---|---|---|---|---|---|"]
    for r in results:
        ratios = " | ".join(f"{r['ratio'][name]:.3f}" for name in ("minimal", "bare", "tuned"))
        lines.append(f"| {r['stack']} | {r['device']} | {ratios} | {r['ms']['recipe']:.1f} |")
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    p.add_argument("--steps", type=int, default=20, help=f"measured rounds, after {WARMUP} rounds of warmup")
    p.add_argument("--threads", type=int, help="threads of torch on a CPU (default: all cores)")
    p.add_argument("--out", type=Path, help="also write the results to this file, as JSON")
    for name, value in SHAPE.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # measure one stack in this process
    args = p.parse_args()
    if args.child:
        result = measure(args.stacks[0], {name: getattr(args, name) for name in SHAPE}, args.steps, args.threads)
        args.out.write_text(json.dumps(result), encoding="utf-8")
        sys.stdout.flush()
        os._exit(0)  # worker threads of the stacks outlive a normal exit by seconds
    results = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = sys.argv[1:]
        for stack in args.stacks:
            result_file = Path(folder) / f"{stack}.json"
            command = [
                sys.executable,
                "-m",
                "scripts.bench_speed",
                *arguments,
                "--stacks",
                stack,
                "--out",
                str(result_file),
                "--child",
            ]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            results.append(json.loads(result_file.read_text(encoding="utf-8")))
            print(f"{stack}: {json.dumps(results[-1]['ratio'])}", file=sys.stderr, flush=True)
    print(table(results))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
