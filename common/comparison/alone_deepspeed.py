"""Ten mistakes on DeepSpeed, in scripts as its documentation shows them. For alone.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.comparison.forked import LENGTH, POSITIONS, STEPS, VOCAB, differences, does, flip


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
    deepspeed_steps(engine, first_id)
    return engine


def deepspeed_steps(engine: Any, first_id: int = 0) -> None:
    import torch

    ids = torch.arange(first_id, first_id + LENGTH).expand(2, -1)
    for _ in range(STEPS * engine.gradient_accumulation_steps()):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
    does(f"trains on, loss {loss.item():.2f}")


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
    changed = differences(saved, net.transformer.wte.weight)
    deepspeed_steps(engine)
    does(f"trains on, from {changed} changed weight")


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
