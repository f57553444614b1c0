"""Under torchrun: logits of Megatron and of the recipe's transformers classes against plain transformers, `CASES.json`.

CASES: list of {config, overrides, out}; overrides name the folder of the weights, init.from.
"""

import json
import os
import sys

sys.path.insert(0, os.getcwd())  # the repository's root

from common.launch import processes  # noqa: E402

processes.quiet()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from common import preflight  # noqa: E402
from common.checkpoints import state  # noqa: E402
from common.stacks import cuda_stand_in, mcore  # noqa: E402
from recipes.t5 import task  # noqa: E402
from recipes.t5.megatron import model as megatron_model  # noqa: E402
from recipes.t5.megatron.parameter_map import parameter_map  # noqa: E402
from tests import plain_t5  # noqa: E402


def filled(net: torch.nn.Module, values: state.Values) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(values(name, parameter.shape)["weight"])
    return net.eval()


def main(path: str) -> None:
    ranks = processes.start()
    for case in json.load(open(path, encoding="utf-8")):
        run = preflight.prepare(case["config"], case["out"], case["overrides"], "megatron", task, ranks.world)
        cfg, layout = run.cfg, run.layout
        mcore.start(ranks, layout)
        model = mcore.wrap(megatron_model.build(cfg, layout), cfg, ranks)
        optimizer = mcore.optimizer_for(model, cfg, ranks)
        shapes = task.parameter_shapes(cfg.model)
        values = state.values(cfg, task, shapes, None)
        mcore.load_state(model, optimizer, parameter_map(cfg.model), shapes, values, 0)
        model.eval()
        batch = task.make_batch(run.train.collate(range(8)), "cpu")
        with torch.no_grad():
            with cuda_stand_in.active(ranks):
                shard = model[0](batch["inputs"], batch["decoder_inputs"], ~batch["attention_mask"][:, None, None])
            group = mcore.parallel_state.get_tensor_model_parallel_group()
            shards = [torch.empty_like(shard) for _ in range(group.size())]
            dist.all_gather(shards, shard.contiguous(), group=group)
            megatron = torch.cat(shards, -1)[..., : cfg.model.vocab_size]  # (B, S, V)
            plain = filled(plain_t5.net_of(cfg.model), values)
            mask = batch["attention_mask"].long()
            expected = plain(batch["inputs"], attention_mask=mask, decoder_input_ids=batch["decoder_inputs"]).logits
            recipe = filled(task.hf_model(cfg.model), values)(**task.model_inputs(batch)).logits
        if ranks.rank == 0:
            is_target = batch["loss_mask"]
            for name, logits in (("megatron", megatron), ("deepspeed", recipe)):
                apart = (logits - expected)[is_target].abs().max().item()
                print(f"LOGITS {name} {apart:.3e} of {expected.abs().max().item():.3f}", flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
