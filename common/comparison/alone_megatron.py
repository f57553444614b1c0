"""Ten mistakes on Megatron Core, in scripts as its documentation shows them. For alone.py."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.comparison.forked import LENGTH, POSITIONS, RANKS, STEPS, VOCAB, differences, does, flip


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
        changed = differences(saved, net.embedding.word_embeddings.weight)
        megatron_train(net)
        does(f"trains on, from {changed} changed weight")


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
