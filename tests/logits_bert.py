"""Under torchrun: logits of Megatron and of the recipe's transformers classes against plain transformers, `CASES.json`.

CASES: list of {config, overrides, out}, and for sentence embeddings `pairs` (texts) and `tokenizer`, with `vectors`, the file
that receives the mean-pooled hidden states of Megatron's encoder.
"""

import json
import os
import sys
from typing import Any

sys.path.insert(0, os.getcwd())  # the repository's root

from common.launch import processes  # noqa: E402

processes.quiet()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402

from common import preflight  # noqa: E402
from common.checkpoints import state  # noqa: E402
from common.data import tokenizer  # noqa: E402
from common.stacks import cuda_stand_in, mcore  # noqa: E402
from recipes.bert import task  # noqa: E402
from recipes.bert.megatron import model as megatron_model  # noqa: E402
from recipes.bert.megatron.parameter_map import parameter_map  # noqa: E402


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
        [net] = nets = megatron_model.build(cfg, layout)
        model = mcore.wrap(nets, cfg, ranks)
        optimizer = mcore.optimizer_for(model, cfg, ranks)
        shapes = task.parameter_shapes(cfg.model)
        values = state.values(cfg, task, shapes, None)
        mcore.load_state(model, optimizer, parameter_map(cfg.model), shapes, values, 0)
        model.eval()
        with torch.no_grad():
            compare(cfg, model[0], values, run, ranks)
            if "pairs" in case:
                embed(case, net, ranks)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def compare(cfg: task.Config, model: torch.nn.Module, values: state.Values, run: preflight.Run, ranks: processes.Ranks) -> None:
    batch = task.make_batch(run.train.collate(range(8)), "cpu")
    with cuda_stand_in.active(ranks):
        shard, pairs = model(batch["tokens"], batch["token_types"], ~batch["attention_mask"][:, None, None], batch["predicted"])
    group = mcore.parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    megatron = torch.cat(shards, -1)[:, : cfg.model.vocab_size]  # (N, V)

    plain = filled(getattr(transformers, task.hf_class_name(cfg.model))(task.hf_config(cfg.model)), values)
    out = plain(batch["tokens"], token_type_ids=batch["token_types"], attention_mask=batch["attention_mask"].long())
    expected = out.prediction_logits.flatten(0, 1)[batch["predicted"]]
    recipe, recipe_pairs = filled(task.hf_model(cfg.model), values)(**task.model_inputs(batch))
    if ranks.rank == 0:
        for name, tokens, pair in (("megatron", megatron, pairs), ("deepspeed", recipe, recipe_pairs)):
            differences = (tokens - expected).abs().max().item(), (pair - out.seq_relationship_logits).abs().max().item()
            print("LOGITS {} {:.3e} {:.3e} of {:.3f}".format(name, *differences, expected.abs().max().item()), flush=True)


def embed(case: dict[str, Any], net: megatron_model.Bert, ranks: processes.Ranks) -> None:
    """Mean of the last hidden states over the tokens of each text, [CLS] and [SEP] too."""
    words = tokenizer.load(case["tokenizer"])
    ids = [[words.cls_id, *text[:126], words.sep_id] for text in words.encode_batch(case["pairs"])]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
    vectors = np.empty((len(ids), net.config.hidden_size), np.float32)
    tp = mcore.parallel_state.get_tensor_model_parallel_world_size()
    for first in range(0, len(order), 64):
        some = order[first : first + 64]
        longest = max(len(ids[i]) for i in some)
        longest += -longest % tp
        tokens = torch.full((len(some), longest), words.pad_id)
        for row, i in enumerate(some):
            tokens[row, : len(ids[i])] = torch.tensor(ids[i])
        seen = torch.arange(longest) < torch.tensor([len(ids[i]) for i in some])[:, None]
        with cuda_stand_in.active(ranks):
            hidden = net.encode(tokens, torch.zeros_like(tokens), ~seen[:, None, None])  # (T, B, H)
        weights = seen.T[..., None].float()  # (T, B, 1)
        vectors[some] = ((hidden * weights).sum(0) / weights.sum(0)).numpy()
    if ranks.rank == 0:
        np.save(case["vectors"], vectors)


if __name__ == "__main__":
    main(sys.argv[1])
