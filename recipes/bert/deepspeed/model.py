"""BERT on DeepSpeed: the `transformers` class, sharded as it is built at ZeRO stage 3."""

from typing import Any

import deepspeed
from accelerate import init_empty_weights
from transformers import PreTrainedModel

from common.config import Config
from common.contract import Family
from common.stacks import attention, zero
from common.training import init

from .. import task


def build(cfg: Config, ds_config: dict[str, Any], family: Family = task) -> PreTrainedModel:
    """Build the model of a family module. Its parameters are allocated but not initialized: zero.load_state sets them.

    At stage 3, each parameter is split as soon as it is created.
    """
    if cfg.deepspeed.zero_stage == 3:
        # Init ignores its `dtype` argument where fp16 is not supported (0.19.8, partition_parameters.py); ds_config sets it
        with deepspeed.zero.Init(config_dict_or_path=ds_config):
            net = family.hf_model(cfg.model)
    else:
        with init_empty_weights():
            net = family.hf_model(cfg.model)
        init.allocate(net, zero.weights_dtype(cfg))
    if cfg.deepspeed.tp > 1:
        attention.draw_by_rank(net)
    if cfg.deepspeed.recompute:
        net.activation_checkpointing_enable({"use_reentrant": False})
    return net
