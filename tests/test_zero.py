"""DeepSpeed's configuration, and what replaces two of its functions on a GPU."""

import pytest
import torch
from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace

from common.stacks import zero


@pytest.mark.parametrize(
    ("parameters", "dp", "bucket", "all_reduce"),
    [
        (1_316_000_000, 8, 40_000_000, False),  # GPT 1.3B: an owner has 164 million gradients
        (1_316_000_000, 64, 64_000_000, True),  # 20 million, which 64 ranks in a row would hand on
        (124_000_000, 8, 40_000_000, False),
        (200_000, 2, 200_000, True),  # the tiny configs
        (200_000, 1, 200_000, True),
    ],
)
def test_buckets_and_the_operation_that_reduces_them(parameters: int, dp: int, bucket: int, all_reduce: bool) -> None:
    found = zero._reduction(parameters, dp)
    assert found == {"reduce_bucket_size": bucket, "use_multi_rank_bucket_allreduce": all_reduce}


@pytest.mark.parametrize("value", [0.0, 1.5, float("inf"), -float("inf"), float("nan")])
def test_a_norm_is_masked_as_deepspeed_masks_it(value: float) -> None:
    ours, theirs = torch.tensor(value), torch.tensor(value)
    zero._mask_invalid(ours)
    mask_nan_or_inf_with_val_inplace(theirs)
    assert ours.equal(theirs)
