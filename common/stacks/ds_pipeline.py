"""DeepSpeed's pipeline over a `transformers` model: which of its modules a stage holds, and their parameters by name.

The schedule, its sends and its sums are DeepSpeed's (deepspeed/runtime/pipe/engine.py); a recipe calls engine.train_batch and
engine.eval_batch. What is carried from layer to layer, and from stage to stage, is a tuple: the hidden states first, then the
masks and positions that later layers read. Only the hidden states are of a floating type: DeepSpeed sends the gradient of
every such tensor back.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from transformers import PreTrainedModel

from common.config import Config
from common.contract import Family
from common.launch.processes import Ranks
from common.layout import Layout
from common.stacks import stages, zero
from common.training import init

Carried = tuple[torch.Tensor, ...]
Batch = dict[str, Any]  # the tensors of a micro batch, and the weight of its loss
# (what the last layer returns, batch) -> weighted loss to differentiate, and what else the recipe wants of the micro batch
LossFunction = Callable[[Carried, Batch], tuple[torch.Tensor, Any]]


class Layer(torch.nn.Module):
    """Some modules of the model, and the function that calls them with what is carried."""

    def __init__(self, call: Callable[..., Carried], *modules: torch.nn.Module):
        super().__init__()
        self.call, self.held = call, torch.nn.ModuleList(modules)

    def forward(self, carried: Carried) -> Carried:
        return self.call(carried, *self.held)

    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


class SharedEmbedding(TiedLayerSpec):  # type: ignore[misc]  # deepspeed has no annotations
    """Stands first and last: says that both stages hold the embedding, whose gradients DeepSpeed sums. It computes nothing."""

    def __init__(self, module: torch.nn.Module):
        super().__init__("embedding", type(module), forward_fn=lambda _, carried: carried)
        self.module = module

    def build(self, log: bool = False) -> torch.nn.Module:
        return self.module


class Stage(PipelineModule):  # type: ignore[misc]
    """This rank's stage. Its named_parameters have their Hugging Face names."""

    def __init__(
        self, entries: Sequence[Any], layout: Layout, bounds: Sequence[int], net: PreTrainedModel, loss_of: LossFunction
    ):
        """entries: Layers, a SharedEmbedding before and after them if the output is tied. bounds: stage i has the entries from
        bounds[i] up to bounds[i + 1]. net: the model; the parameters of other stages are on the meta device."""
        self.named = [(name, parameter) for name, parameter in net.named_parameters() if not parameter.is_meta]
        self.loss_of = loss_of
        self.results: list[Any] = []  # the second values of loss_of, of each micro batch of this batch; none on other stages
        self.begin_micro_batch: Callable[[int], object] = int
        self.micro_batch = 0
        topology = PipeDataParallelTopology(num_pp=layout.pp, num_dp=layout.dp)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a table of the layers
            super().__init__(entries, topology=topology, partition_method=bounds, loss_fn=self._loss)

    def _partition_layers(self, method: Sequence[int]) -> None:
        """method: the bounds. PipelineModule knows only the names of ways to find them."""
        self.parts = method
        self._set_bounds(*method[self.stage_id : self.stage_id + 2])

    def _synchronize_tied_weights(self) -> None:
        """PipelineModule would send those of the first stage, which have no values yet: zero.load_state sets them on both."""

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return iter(self.named)

    def begin(self, begin_micro_batch: Callable[[int], object]) -> None:
        """Begin a batch, of training or of evaluation: begin_micro_batch is called with the number of each micro batch before
        this stage's forward pass of it."""
        self.begin_micro_batch, self.micro_batch, self.results = begin_micro_batch, 0, []

    def _loss(self, carried: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        loss, result = self.loss_of(tuple(carried), batch)
        carried.clear()
        self.results.append(result)
        return loss

    def forward(self, carried: Carried) -> Carried | list[torch.Tensor]:
        """The last stage returns a list, which _loss empties: the engine keeps it until two micro batches later, and the logits
        with it (pipe_buffers in deepspeed/runtime/pipe/engine.py)."""
        self.begin_micro_batch(self.micro_batch)
        self.micro_batch += 1
        output: Carried = super().forward(carried)
        return list(output) if self.stage_id == self.num_stages - 1 else output


def build(
    cfg: Config,
    layout: Layout,
    ranks: Ranks,
    family: Family,
    cut: Callable[[PreTrainedModel], tuple[Sequence[Layer], LossFunction]],
) -> Stage:
    """This rank's stage of the model of a family module. Its parameters are allocated but not initialized: zero.load_state sets
    them. Those of other stages take no memory.

    cut: cuts the model into its embedding, each transformer layer, and its output, which holds all that the loss function uses.
    """
    with init_empty_weights():
        net = family.hf_model(cfg.model)
    net.tie_weights()
    if cfg.deepspeed.recompute:
        net.activation_checkpointing_enable({"use_reentrant": False})
    cut_layers, loss_of = cut(net)
    layers: list[Any] = list(cut_layers)
    bounds = stages.bounds(cfg.deepspeed.partition, [layer.size() for layer in layers], layout.pp)
    number = zero.stage_of(layout, ranks)
    held = {parameter for layer in layers[bounds[number] : bounds[number + 1]] for parameter in layer.parameters()}
    init.allocate(net, zero.weights_dtype(cfg), {name for name, parameter in net.named_parameters() if parameter in held})
    embedding = net.get_input_embeddings()
    if any(parameter is embedding.weight for parameter in cut_layers[-1].parameters()):
        shared = SharedEmbedding(embedding)
        layers = [shared, *layers, shared]
        bounds = [0, *(bound + 1 for bound in bounds[1:-1]), len(layers)]
    return Stage(layers, layout, bounds, net, loss_of)
