"""Cross entropy over a large vocabulary: exact, and without tensors of the logits' size in fp32."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common.training import loss

V = 50_304  # GPT-2's vocabulary, padded


class Sizes(TorchDispatchMode):
    """The storages that the operators write, by their address, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return out


def sample(n: int, dtype: torch.dtype = torch.float32, v: int = V) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (n, v), targets (n,) and weights of the losses, of both signs and 0, (n,)."""
    torch.manual_seed(n)
    return (torch.randn(n, v) * 3).to(dtype), torch.randint(0, v, (n,)), torch.randn(n) * (torch.arange(n) % 3 > 0)


@pytest.mark.parametrize("leaf", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("n", (0, 1, 64, 67))  # 67 rows are no whole number of chunks
def test_equals_fp64(n: int, dtype: torch.dtype, leaf: bool):
    logits, targets, weights = sample(n, dtype)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (expected * weights).sum().backward()

    given = logits.clone().requires_grad_()
    losses = loss.cross_entropy(given if leaf else given * 1, targets)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses.double(), expected, rtol=2e-7, atol=0)  # F.cross_entropy in fp32 is 2.5e-6 too low on a CPU
    (losses * weights).sum().backward()
    assert given.grad.dtype == dtype and torch.equal(given.detach(), logits)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    assert torch.allclose(given.grad.double(), exact.grad, rtol=rounding, atol=1e-10)


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("leaf", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_fused_as_on_a_gpu_equals_fp64(dtype: torch.dtype, leaf: bool, compiled: bool):
    """compiled: by Inductor's kernels for a CPU, which add up a vocabulary one after the other in each vector lane."""
    logits, targets, weights = sample(67, dtype)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (expected * weights).sum().backward()

    given = logits.clone().requires_grad_()
    losses = loss.FusedVocabulary.apply(given if leaf else given * 1, targets, None, compiled)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses.double(), expected, rtol=1e-6 if compiled else 2e-7, atol=0)
    (losses * weights).sum().backward()
    assert given.grad.dtype == dtype and torch.equal(given.detach(), logits)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5 if compiled else 1e-6
    assert torch.allclose(given.grad.double(), exact.grad, rtol=rounding, atol=1e-10)


def fused(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return loss.FusedVocabulary.apply(logits, targets, None, False)


@pytest.mark.parametrize("function", (loss.cross_entropy, fused))
def test_large_logits_do_not_overflow(function: Callable[..., torch.Tensor]):
    logits = torch.full((2, V), -1e4)
    logits[0, 7] = 1e4
    losses = function(logits, torch.tensor([7, 7]))
    assert losses[0] == 0 and losses[1] == torch.tensor(float(V)).log()


def test_keeps_no_copy_of_the_logits():
    """A chunk in fp32, and no other tensor as large: the gradient is written over the logits."""
    logits, targets, weights = sample(256, torch.bfloat16)
    output = logits.clone().requires_grad_() * 1  # as of a layer
    address = output.data_ptr()
    with Sizes() as sizes:
        (gradient,) = torch.autograd.grad((loss.cross_entropy(output, targets) * weights).sum(), output)
    is_in_place = gradient.data_ptr() == address
    assert is_in_place
    largest = max(size for at, size in sizes.bytes.items() if at != address)
    assert largest <= 4 * loss.CPU_CHUNK < logits.nbytes


def test_logits_without_gradient_are_kept():
    logits, targets, _ = sample(64)
    kept = logits.clone()
    with torch.no_grad():
        loss.cross_entropy(logits, targets)
    assert torch.equal(logits, kept)


def test_a_second_backward_is_refused():
    """The first one has overwritten the logits: autograd must say so, not return something else."""
    logits, targets, _ = sample(2)
    total = loss.cross_entropy(logits.requires_grad_() * 1, targets).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_small_vocabulary_is_torchs_own(dtype: torch.dtype):
    """Bit for bit: the published curves of the quickstarts."""
    logits, targets, _ = sample(64, dtype, v=4096)
    assert torch.equal(loss.cross_entropy(logits, targets), F.cross_entropy(logits.float(), targets, reduction="none"))
