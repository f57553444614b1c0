"""How long a run takes to the end of its first step, beside transformers.Trainer: new processes, in turn.

    python -m common.comparison.starts CORPUS OUT SHAPE STACK    the Trainer's script; SHAPE: JSON of a small.Shape

A recipe is started by its launch script, a Trainer as its users do it: `python` alone, `torchrun` with DeepSpeed. One process
each. The Trainer draws its own initial values and reads the same corpus, memory-mapped.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.comparison import small
from common.comparison.figures import Figure, Options, Task
from common.errors import BadInput
from common.paths import ROOT

SECTION = "Performance / Start beside transformers.Trainer"
ON_CPU = small.Shape(layers=4, hidden=192, heads=4, seq_len=128, batch=8, micro_batch=8, vocab=4096)
ON_GPU = small.Shape(layers=12, hidden=1024, heads=16, seq_len=512, batch=16, micro_batch=16, vocab=4096)
BESIDE = {"baseline": "Trainer", "deepspeed": "Trainer + DeepSpeed", "megatron": "Trainer"}
LIMIT = 300.0  # seconds for a first step
DONE = "metrics.jsonl"  # its first line ends the time: a recipe writes it after each step


def start_up(options: Options, folder: Path) -> list[Figure]:
    if options.configs:
        raise BadInput("configs are given; without, it starts small models")
    shape = ON_GPU if small.has_gpu() else ON_CPU
    small.make_corpus("gpt", folder / "corpus")
    stacks = [stack for stack in BESIDE if stack in options.stacks]
    names = [*stacks, *dict.fromkeys(BESIDE[stack] for stack in stacks)]
    rounds: list[dict[str, float]] = []
    for number in range(-1, options.rounds):  # the first round reads the packages from the disk, and does not count
        outs = {name: folder / f"{number}_{name.replace(' ', '_')}" for name in names}
        rounds.append({name: seconds_to_first_step(command_of(name, shape, folder / "corpus", outs[name]), outs[name])
                       for name in names})  # fmt: skip
    source = f"python -m scripts.benchmark --parts start_up --rounds {options.rounds}"
    return figures_of(rounds[1:], stacks, source)


def command_of(name: str, shape: small.Shape, corpus: Path, out: Path) -> list[str]:
    """name: a stack, or a value of BESIDE."""
    if name in BESIDE:
        words = [*small.overrides_of("gpt", shape, corpus), "train.steps=1"]
        return ["bash", f"recipes/gpt/{name}/pretrain.sh", str(small.config_of("gpt")), str(out), *words]
    script = ["-m", "common.comparison.starts", str(corpus), str(out), json.dumps(shape), name]
    if name == "Trainer":
        return [sys.executable, *script]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", *script]


def seconds_to_first_step(command: Sequence[str], out: Path) -> float:
    """From the start of the command to the first line of DONE. Waits for the end of the run. BadInput if it fails."""
    begin, seconds = time.monotonic(), None
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NPROC": "1"}
    with open(out.with_name(f"{out.name}.log"), "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None and time.monotonic() - begin < LIMIT:
            if seconds is None and (out / DONE).is_file() and (out / DONE).stat().st_size:
                seconds = time.monotonic() - begin
            time.sleep(0.01)
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode or seconds is None:
        last = Path(log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
        raise BadInput(f"{' '.join(command[:4])}: exit code {process.returncode}, no first step: {last[-1]}")
    return seconds


def figures_of(rounds: Sequence[dict[str, float]], stacks: Sequence[str], source: str) -> list[Figure]:
    """The median of each command, and of the ratios to the Trainer of the same round, with the least and the greatest."""
    found = []
    for name in rounds[0]:
        values = [one[name] for one in rounds]
        cells = [("to the first step", values, "s")]
        if name in stacks:
            cells.append(("to Trainer's", [one[name] / one[BESIDE[name]] for one in rounds], ""))
        for metric, numbers, unit in cells:
            around = (min(numbers), max(numbers))
            found.append(Figure(SECTION, name, metric, statistics.median(numbers), unit, "measured", source, around))
    return found


# ---- the Trainer's script --------------------------------------------------------------------------------------------


def main() -> None:
    corpus, out, shape, name = sys.argv[1:]
    train(Path(corpus) / "train", Path(out), small.Shape(*json.loads(shape)), name != "Trainer")


def train(prefix: Path, out: Path, shape: small.Shape, with_deepspeed: bool) -> None:
    """One step of transformers.Trainer as it comes."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    from common.data.indexed_dataset import IndexedDataset

    if with_deepspeed and not torch.cuda.is_available():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first, as in zero.start

    class Samples(torch.utils.data.Dataset[dict[str, Any]]):
        corpus = IndexedDataset(prefix)

        def __len__(self) -> int:
            return shape.batch

        def __getitem__(self, number: int) -> dict[str, Any]:
            ids = self.corpus.read(number * shape.seq_len, (number + 1) * shape.seq_len)
            tokens = torch.from_numpy(ids.astype("int64"))
            return {"input_ids": tokens, "labels": tokens}

    class FirstStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            out.mkdir(parents=True, exist_ok=True)
            (out / DONE).write_text("{}\n", encoding="utf-8")

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab, n_positions=shape.seq_len, n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    zero = {
        "zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"), per_device_train_batch_size=shape.micro_batch, max_steps=1, report_to="none",
        gradient_accumulation_steps=shape.batch // shape.micro_batch, use_cpu=not torch.cuda.is_available(),
        deepspeed=zero if with_deepspeed else None,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Samples(), callbacks=[FirstStep()]).train()


TASKS = (Task("start_up", SECTION, 150, start_up),)


if __name__ == "__main__":
    main()
