"""Ten mistakes on DeepSpeed and Megatron Core without this repository, and those that here only the ranks can see.

    python -m common.comparison.alone FOLDER [STACK ...]

Each mistake is made in processes of its own, two ranks over gloo on CPUs, forked from this one, which has imported the stacks.
They train a model of two layers for three steps, as the documentation of each stack shows it. One line of JSON per attempt goes
to standard output: mistake, stack, exit code, lines that all ranks wrote to standard error, and the last of them.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

RANKS, STEPS = 2, 3
GRACE = 2.0  # seconds that the other ranks have for words of their own after the first one has failed
LIMIT = 60.0  # seconds of an attempt
IMPORTS = {
    "deepspeed": ("deepspeed", "deepspeed.pipe", "transformers.models.gpt2.modeling_gpt2"),
    "megatron": ("megatron.core.models.gpt.gpt_model", "megatron.core.optimizer", "megatron.core.distributed"),
}
VOCAB, POSITIONS, LENGTH = 64, 32, 16

# ---- DeepSpeed


def deepspeed_config(**over: Any) -> dict[str, Any]:
    own = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1},
        "steps_per_print": 999,
    }
    return {**own, **over}


def deepspeed_start() -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
    deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def gpt2(positions: int = POSITIONS) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=positions, n_embd=16, n_layer=2, n_head=2))


def deepspeed_train(config: dict[str, Any], net: Any = None, first_id: int = 0, load: Path | None = None) -> Any:
    import torch

    deepspeed = deepspeed_start()
    net = net or gpt2()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    if load:
        engine.load_checkpoint(str(load))
    ids = torch.arange(first_id, first_id + LENGTH).expand(2, -1)
    for _ in range(STEPS * engine.gradient_accumulation_steps()):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
    does(f"trains on, loss {loss.item():.2f}")
    return engine


def deepspeed_key() -> None:
    config = deepspeed_config(zero_optimisation={"stage": 2})
    del config["zero_optimization"]
    engine = deepspeed_train(config)
    does(f"trains on, at ZeRO {engine.zero_optimization_stage()}")


def deepspeed_folder(folder: Path) -> None:
    import torch

    torch.manual_seed(0)
    plain = deepspeed_train(deepspeed_config()).module.lm_head.weight.detach()
    torch.manual_seed(0)
    found = deepspeed_train(deepspeed_config(), load=folder / "nowhere").module.lm_head.weight.detach()
    if plain.equal(found):
        does("trains on, from new weights")


def deepspeed_heads() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shapes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    config = deepspeed_config(train_batch_size=4, tensor_parallel={"autotp_size": 2})
    engine = deepspeed_train(config, LlamaForCausalLM(LlamaConfig(**shapes)))
    rows = engine.module.model.layers[0].self_attn.q_proj.weight.size(0)
    does("trains on, a rank without heads" if rows == 0 else f"trains on, {rows} rows of queries")


def deepspeed_corpus(folder: Path) -> None:
    from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDataset

    MMapIndexedDataset(str(folder / "nowhere"))


def deepspeed_pipeline() -> None:
    import torch

    deepspeed = deepspeed_start()
    from deepspeed.pipe import PipelineModule

    layers = [torch.nn.Linear(8, 8) for _ in range(4)]
    net = PipelineModule(layers=layers, num_stages=2, loss_fn=torch.nn.MSELoss())
    config = deepspeed_config(train_batch_size=4, zero_optimization={"stage": 3})
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(net.parameters()), config=config)
    batches = ((torch.zeros(2, 8), torch.zeros(2, 8)) for _ in range(99))
    engine.train_batch(batches)


def deepspeed_nan() -> None:
    net = gpt2()
    net.transformer.wte.weight.data[0, 0] = float("nan")
    deepspeed_train(deepspeed_config(), net)


def deepspeed_byte(folder: Path) -> None:
    import torch

    engine = deepspeed_train(deepspeed_config())
    saved = engine.module.transformer.wte.weight.detach().clone()
    engine.save_checkpoint(str(folder))
    flip(folder, saved)
    net = gpt2()
    deepspeed = deepspeed_start()
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(net.parameters()), config=deepspeed_config())
    engine.load_checkpoint(str(folder))
    loaded(saved, net.transformer.wte.weight)


DEEPSPEED: dict[str, Callable[[Path], object]] = {
    "none": lambda _: deepspeed_train(deepspeed_config()),
    "key": lambda _: deepspeed_key(),
    "batch": lambda _: deepspeed_train(deepspeed_config(train_batch_size=7)),
    "heads": lambda _: deepspeed_heads(),
    "ids": lambda _: deepspeed_train(deepspeed_config(), first_id=VOCAB - 2),
    "corpus": deepspeed_corpus,
    "positions": lambda _: deepspeed_train(deepspeed_config(), gpt2(positions=LENGTH // 2)),
    "pipeline": lambda _: deepspeed_pipeline(),
    "folder": deepspeed_folder,
    "nan": lambda _: deepspeed_nan(),
    "byte": deepspeed_byte,
}

# ---- Megatron Core


def megatron_start(tp: int = 1, pp: int = 1, vpp: int | None = None) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from common.stacks import cuda_stand_in

    cuda_stand_in.install()  # Megatron Core asks for a GPU where there is none
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tp, pp, vpp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def megatron_model(tp: int = 1, heads: int = 2, positions: int = POSITIONS, **more: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    shapes: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": heads} | more
    config = TransformerConfig(
        **shapes, tensor_model_parallel_size=tp, use_cpu_initialization=True, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )  # fmt: skip
    return GPTModel(config, get_gpt_layer_local_spec(), VOCAB, positions)


def megatron_train(net: Any, first_id: int = 0) -> None:
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = DistributedDataParallel(net.config, DistributedDataParallelConfig(), net)
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, params_dtype=torch.float32, clip_grad=1.0)
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
    ids = torch.arange(first_id, first_id + LENGTH).expand(2, -1)
    for _ in range(STEPS):
        model.zero_grad_buffer()
        loss = model(ids, torch.arange(LENGTH).expand(2, -1), None, labels=ids).mean()
        loss.backward()
        finalize_model_grads([model])
        optimizer.step()
    does(f"trains on, loss {loss.item():.2f}")


def megatron(tp: int = 1, first_id: int = 0, **model: Any) -> None:
    with on_cpu():
        megatron_start(tp)
        megatron_train(megatron_model(tp, **model), first_id)


def on_cpu() -> contextlib.AbstractContextManager[object]:
    from common.stacks import cuda_stand_in

    return cuda_stand_in._CudaMeansCpu()


def megatron_batch() -> None:
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    init_num_microbatches_calculator(0, None, 7, 2, RANKS)


def megatron_corpus(folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    IndexedDataset(str(folder / "nowhere"))


def megatron_load(folder: Path, net: Any) -> None:
    from megatron.core import dist_checkpointing

    net.load_state_dict(dist_checkpointing.load(net.sharded_state_dict(), str(folder)))


def megatron_folder(folder: Path) -> None:
    with on_cpu():
        megatron_start()
        net = megatron_model()
        megatron_load(folder / "nowhere", net)
        megatron_train(net)


def megatron_nan() -> None:
    with on_cpu():
        megatron_start()
        net = megatron_model()
        net.embedding.word_embeddings.weight.data[0, 0] = float("nan")
        megatron_train(net)


def megatron_byte(folder: Path) -> None:
    from megatron.core import dist_checkpointing

    with on_cpu():
        megatron_start()
        net = megatron_model()
        saved = net.embedding.word_embeddings.weight.detach().clone()
        dist_checkpointing.save(net.sharded_state_dict(), str(folder))
        flip(folder, saved)
        megatron_load(folder, net)
        loaded(saved, net.embedding.word_embeddings.weight)


MEGATRON: dict[str, Callable[[Path], object]] = {
    "none": lambda _: megatron(),
    "key": lambda _: megatron(num_layer=3),
    "batch": lambda _: megatron_batch(),
    "heads": lambda _: megatron(tp=2, heads=1),
    "ids": lambda _: megatron(tp=2, first_id=VOCAB - 2),
    "corpus": megatron_corpus,
    "positions": lambda _: megatron(positions=LENGTH // 2),
    "pipeline": lambda _: megatron_start(vpp=2),
    "folder": megatron_folder,
    "nan": lambda _: megatron_nan(),
    "byte": megatron_byte,
}
ALONE = {"deepspeed": DEEPSPEED, "megatron": MEGATRON}


# ---- what an attempt shows


def does(what: str) -> None:
    """Say what the stack does in place of an error."""
    print(f"does: {what}", flush=True)


def flip(folder: Path, weight: Any) -> None:
    """Change one byte of this weight wherever a checkpoint has it, on the first rank, while the others wait."""
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 0:
        content = weight.numpy().tobytes()
        for path in (path for path in folder.rglob("*") if path.is_file()):
            before, found, after = path.read_bytes().partition(content)
            if found:
                path.write_bytes(before + bytes([content[0] ^ 64]) + content[1:] + after)
    dist.barrier()


def loaded(saved: Any, weight: Any) -> None:
    changed = int((saved != weight.detach()).sum())
    does(f"loads {changed} changed weight" if changed else "loads the weights as they were")


# ---- processes


def attempt(call: Callable[[], object], folder: Path, ranks: int = RANKS) -> tuple[int, list[str], list[str]]:
    """(exit code of the first rank that failed, or 0; what all ranks wrote to standard output, and to standard error)"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    files = [tempfile.TemporaryFile(dir=folder) for _ in range(2 * ranks)]
    streams = [file.fileno() for file in files]
    running = {_fork(call, rank, ranks, port, *streams[rank::ranks]) for rank in range(ranks)}
    code, end = 0, time.monotonic() + LIMIT
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.discard(pid)
            if os.waitstatus_to_exitcode(status) and not code:
                code, end = os.waitstatus_to_exitcode(status), time.monotonic() + GRACE
        elif time.monotonic() > end:
            for other in running:
                os.kill(other, signal.SIGKILL)
            code, end = code or -signal.SIGKILL, time.monotonic() + LIMIT
        else:
            time.sleep(0.02)
    texts: list[list[str]] = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode(errors="replace").splitlines())
        file.close()
    return code, sum(texts[:ranks], []), sum(texts[ranks:], [])


def _fork(call: Callable[[], object], rank: int, ranks: int, port: int, stdout: int, stderr: int) -> int:
    pid = os.fork()
    if pid == 0:
        _execute(call, rank, ranks, port, stdout, stderr)
    return pid


def _execute(call: Callable[[], object], rank: int, ranks: int, port: int, stdout: int, stderr: int) -> NoReturn:
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in given.items()} | {"MASTER_ADDR": "127.0.0.1"})
    code = 0
    try:
        call()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def recipe(stack: str, *arguments: str) -> None:
    """A recipe of this repository, as a launch script runs it."""
    sys.argv = [f"recipes.gpt.{stack}.pretrain", *arguments]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def here(stack: str, folder: Path) -> Iterable[tuple[str, Callable[[], object]]]:
    """The mistakes that here the ranks find, on one: first a run without one, whose files are then spoiled. What one of several
    ranks finds, the launcher reports once (tests/test_bad_input.py, test_a_file_that_one_rank_alone_reads_is_reported_once)."""
    from safetensors.torch import load_file, save_file

    config, run = str(folder / "config.yaml"), folder / f"{stack}_run"
    yield "none", partial(recipe, stack, config, str(run))
    spoiled = shutil.copytree(run / "hf", folder / f"{stack}_nan_hf")
    (spoiled / "twinstack.json").unlink()  # its checksums
    weights = load_file(spoiled / "model.safetensors")
    weights["transformer.wte.weight"][0, 0] = float("nan")
    save_file(weights, spoiled / "model.safetensors", {"format": "pt"})
    yield "nan", partial(recipe, stack, config, str(folder / f"{stack}_nan_run"), f"init.from={spoiled}")
    path = run / "step_2/transformer.wte.weight.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 64]) + content[-8:])
    yield "byte", partial(recipe, stack, config, str(run), "train.steps=4")


def attempts(stack: str, folder: Path) -> Iterable[tuple[str, str, Callable[[], object]]]:
    """(mistake, here or alone, what to call)"""
    if (folder / "config.yaml").is_file():
        for name, call in here(stack, folder):
            yield name, "here", call
    for name, of_stack in ALONE[stack].items():
        yield name, "alone", partial(of_stack, folder / f"{stack}_{name}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m common.comparison.alone", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("stacks", nargs="*", help=" or ".join(ALONE))
    options = parser.parse_args()
    folder, stacks = options.folder.resolve(), options.stacks or [*ALONE]
    with warnings.catch_warnings(action="ignore"):
        for stack in stacks:
            for name in IMPORTS[stack]:
                importlib.import_module(name)
    for stack in stacks:
        for mistake, where, call in attempts(stack, folder):
            (folder / f"{stack}_{mistake}").mkdir(exist_ok=True)
            code, printed, errors = attempt(call, folder, 1 if where == "here" else RANKS)
            row = {"mistake": mistake, "stack": stack, "where": where, "code": code, "lines": _lines(where, errors)}
            print(json.dumps(row | {"does": _what_it_does(code, printed, errors)}), flush=True)


def _lines(where: str, errors: list[str]) -> int:
    """The lines of an error: here all that the ranks wrote, else those from a traceback on."""
    first = next((number for number, line in enumerate(errors) if line.startswith("Traceback ")), len(errors))
    return len(errors) - (0 if where == "here" else first)


def _what_it_does(code: int, printed: list[str], errors: list[str]) -> str:
    if code:
        named = (found[1] for line in errors if (found := re.match(r"(?:\w+\.)*(\w+(?:Error|Exception))\b", line)))
        return next(named, f"exit code {code}")
    said = [line.removeprefix("does: ") for line in printed if line.startswith("does: ")]
    warned = any("[WARNING]" in line for line in printed)
    return (said[-1] if said else "ends") + (", after a warning" if warned else "")


if __name__ == "__main__":
    main()
