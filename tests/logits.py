"""Under torchrun: Megatron's logits against transformers' for random weights, `logits.py CASES.json`.

CASES: list of {config, overrides, hf}: the Hugging Face folder whose weights both models take.
"""

import json
import os
import sys

sys.path.insert(0, os.getcwd())  # the repository's root

from common.launch import processes  # noqa: E402

processes.quiet()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from common import preflight  # noqa: E402
from common.checkpoints import state  # noqa: E402
from common.stacks import cuda_stand_in, mcore  # noqa: E402
from recipes.gpt import task  # noqa: E402
from recipes.gpt.megatron import model as megatron_model  # noqa: E402
from recipes.gpt.megatron.parameter_map import parameter_map  # noqa: E402


def main(path: str) -> None:
    ranks = processes.start()
    for case in json.load(open(path, encoding="utf-8")):
        run = preflight.prepare(case["config"], case["out"], case["overrides"], "megatron", task, ranks.world)
        cfg, layout = run.cfg, run.layout
        mcore.start(ranks, layout)
        model = mcore.wrap(megatron_model.build(cfg, layout), cfg, ranks)
        optimizer = mcore.optimizer_for(model, cfg, ranks)
        shapes = task.parameter_shapes(cfg.model)
        mcore.load_state(model, optimizer, parameter_map(cfg.model), shapes, state.values(cfg, task, shapes, None), 0)
        hf = AutoModelForCausalLM.from_pretrained(case["hf"], dtype=torch.float32).eval()
        tokens = torch.from_numpy(run.train.collate(range(4))["tokens"])[:, :-1]  # (B, T)
        model.eval()
        with torch.no_grad(), cuda_stand_in.active(ranks):
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            shard = model[0](tokens, positions, None)  # (B, T, V / tp)
        shards = [torch.empty_like(shard) for _ in range(layout.tp)]
        dist.all_gather(shards, shard.contiguous(), group=mcore.parallel_state.get_tensor_model_parallel_group())
        megatron = torch.cat(shards, -1)[..., : cfg.model.vocab_size]
        with torch.no_grad():
            expected = hf(tokens).logits
        if ranks.rank == 0:
            print(f"LOGITS {(megatron - expected).abs().max().item():.3e} of {expected.abs().max().item():.3f}", flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
