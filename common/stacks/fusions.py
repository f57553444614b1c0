"""Megatron's pointwise work as few kernels: megatron.fusions. Checked with megatron-core 0.19.2.

Between its matrix products, a step on a GPU waits for the memory: bias, activation, dropout, sums, the loss. torch.compile
makes one kernel of each function here, which reads its inputs once. Megatron's own fusions lack some of our activations, keep
the logits in fp32, and need Apex to add the gradients of weights in the product.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig

from common.config import Config
from common.training import compiling, loss


def settings(cfg: Config) -> dict[str, Any]:
    """The fields of TransformerConfig that fuse. By default on a GPU: on a CPU torch.compile takes longer than a small run, and
    published curves are of the plain functions."""
    on = torch.cuda.is_available() if cfg.megatron.fusions is None else cfg.megatron.fusions
    adds = torch.cuda.is_available() or cfg.train.dtype == "fp32"  # a CPU has no product of bf16 that adds to fp32
    return {
        "bias_dropout_fusion": on,  # of the output of attention and MLP; here also of the MLP's activation (Mlp)
        "cross_entropy_loss_fusion": on,  # common/training/loss.py, FusedVocabulary
        "gradient_accumulation_fusion": on and adds,  # WeightGradient
    }


def _compiled(function: Callable[..., Any], config: TransformerConfig) -> Callable[..., Any]:
    return compiling.kernel(function) if config.bias_dropout_fusion else function


# ---- MLP -------------------------------------------------------------------------------------------------------------


def activate(
    x: torch.Tensor, bias: torch.Tensor | None, function: Callable[[torch.Tensor], torch.Tensor], gated: bool, dropout: float
) -> torch.Tensor:
    """x (T, B, F or 2F) of the MLP's first linear layer -> (T, B, F)"""
    if bias is not None:
        x = x + bias
    if gated:
        gate, up = x.chunk(2, -1)
        x = function(gate) * up
    else:
        x = function(x)
    return F.dropout(x, dropout) if dropout else x


class Mlp(MLP):  # type: ignore[misc]  # megatron-core has no annotations
    """Megatron's MLP with what lies between its two products as one function."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        x, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(self.activated(x, bias))

    def activated(self, x: torch.Tensor, bias: torch.Tensor | None, dropout: float = 0.0) -> torch.Tensor:
        function = _compiled(activate, self.config)
        return function(x, bias, self.config.activation_func, self.config.gated_linear_unit, dropout)


# ---- norms -----------------------------------------------------------------------------------------------------------


class NormAndResidual(torch.autograd.Function):
    """x -> its norm, and x for the residual connection: one kernel computes the gradient of the norm and adds the other's."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, config: TransformerConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        aten = torch.ops.aten
        if bias is None:
            normed, *kept = aten._fused_rms_norm(x, weight.shape, weight, eps)
        else:
            normed, *kept = aten.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.config = config
        ctx.save_for_backward(x, weight, bias, *kept)
        return normed, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, of_residual: torch.Tensor) -> Any:
        function = _compiled(norm_backward, ctx.config)
        return *function(grad, of_residual, list(ctx.needs_input_grad[:3]), *ctx.saved_tensors), None, None


def norm_backward(
    grad: torch.Tensor, of_residual: torch.Tensor, wanted: list[bool], x: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None, *kept: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight and bias, as far as they are wanted. grad, of_residual, x (T, B, H); kept: of the forward pass"""
    aten = torch.ops.aten
    if bias is None:
        grads = [*aten._fused_rms_norm_backward(grad, x, weight.shape, *kept, weight, wanted[:2]), None]
    else:
        grads = list(aten.native_layer_norm_backward(grad, x, weight.shape, *kept, weight, bias, wanted))
    if wanted[0]:
        grads[0] = grads[0] + of_residual
    return tuple(grads)


# ---- linear layers ---------------------------------------------------------------------------------------------------


class BiasedLinear(layers.ColumnParallelLinear):  # type: ignore[misc]  # megatron-core has no annotations
    """Megatron's linear layer, where the product adds the bias."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **more: Any) -> Any:
        if bias is None or not weight.requires_grad or not self.config.bias_dropout_fusion:
            return super()._forward_impl(input, weight, bias=bias, **more)
        names = "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel", "tp_group"
        return BiasedProduct.apply(input, weight, bias, *(more[name] for name in names))


class BiasedProduct(layers.LinearWithGradAccumulationAndAsyncCommunication):  # type: ignore[misc]
    """Megatron's product with the bias in it, and Megatron's backward pass."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")  # type: ignore[untyped-decorator]  # as the backward pass has it
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: torch.Tensor, accumulates: bool, reduces: bool,
        sequence_parallel: bool, group: dist.ProcessGroup,
    ) -> torch.Tensor:  # fmt: skip
        """x (T, B, I) or with sequence parallelism (T / tp, B, I), weight (O / tp, I) -> (T, B, O / tp)"""
        ctx.save_for_backward(x, weight)
        ctx.main_grad = weight.main_grad if accumulates else None
        ctx.gradient_accumulation_fusion, ctx.allreduce_dgrad, ctx.sequence_parallel = accumulates, reduces, sequence_parallel
        ctx.use_bias, ctx.tp_group, ctx.gtp_remat_size = True, group, 1
        ctx.grad_output_buffer = ctx.wgrad_deferral_limit = None
        if sequence_parallel:
            shape = [len(x) * group.size(), *x.shape[1:]]
            whole = parallel_state.get_global_memory_buffer().get_tensor(shape, x.dtype, "mpu")
            dist.all_gather_into_tensor(whole, x, group=group)
            x = whole
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return layers.LinearWithGradAccumulationAndAsyncCommunication.backward(ctx, grad)[:7]


class WeightGradient:
    """Stands for Apex's extension fused_weight_gradient_mlp_cuda, which Megatron calls: the product adds to the fp32 gradient,
    where otherwise a bf16 gradient is written, read and added."""

    @staticmethod
    def wgrad_gemm_accum_fp32(x: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor) -> None:
        """x (N, I), grad (N, O), main_grad (O, I) fp32"""
        if x.dtype == main_grad.dtype:
            main_grad.addmm_(grad.t(), x)
        else:
            torch.ops.aten.addmm.dtype_out(main_grad, grad.t(), x, main_grad.dtype, out=main_grad)


def install() -> None:
    """Let Megatron find WeightGradient."""
    layers.fused_weight_gradient_mlp_cuda, layers._grad_accum_fusion_available = WeightGradient, True
    layers.HAVE_TE = False  # its buffer for the gradients that are left empty


# ---- loss ------------------------------------------------------------------------------------------------------------


def cross_entropy(config: TransformerConfig, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits (..., V / tp), targets (...) -> losses (...) in fp32, equal on each tensor-parallel rank."""
    if not config.cross_entropy_loss_fusion:
        plain: torch.Tensor = tensor_parallel.vocab_parallel_cross_entropy(logits, targets)
        return plain
    group = parallel_state.get_tensor_model_parallel_group()
    shifted = targets - group.rank() * logits.size(-1)
    losses: torch.Tensor = loss.FusedVocabulary.apply(logits, shifted, group, config.bias_dropout_fusion)
    return losses
