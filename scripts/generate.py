"""Text from a model, token by token, with nothing but plain transformers: GPT goes on with a text, BERT fills in its [MASK],
T5 says what stood in the place of <extra_id_0>, or answers.

python -m scripts.generate MODEL... [--prompt TEXT] [--chat] [--tokens N] [--temperature T] [--top-k K] [--seed N]

MODEL is an OUT folder of pretrain.sh or finetune.sh (its export, OUT/hf, is taken), or any causal, masked or encoder-decoder
language model in Hugging Face form. The same weights and seed give the same text. A masked one takes --prompt alone, a text
with [MASK], and gives the likeliest tokens for each. With --chat the prompt is a question, put by the tokenizer's chat template
as a model finetuned on conversations (sft) has learnt it.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from common import families
from common.errors import BadInput, exit_cleanly
from common.huggingface.pretrained import architecture_of, load, refuse_unknown
from common.json_files import read_object


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="MODEL")
    parser.add_argument("--prompt", metavar="TEXT", default="", help="how it begins (default: as a document begins)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a question of a conversation")
    parser.add_argument("--tokens", metavar="N", type=int, default=64, help="tokens to add (default: %(default)s)")
    help_text = "0 takes the likeliest token each time (default: %(default)s)"
    parser.add_argument("--temperature", metavar="T", type=float, default=0.7, help=help_text)
    help_text = "choose among the K likeliest tokens (default: %(default)s)"
    parser.add_argument("--top-k", metavar="K", type=int, default=20, help=help_text)
    parser.add_argument("--seed", metavar="N", type=int, default=1234, help="default: %(default)s")
    args = parser.parse_args()
    folders = [given if (Path(given) / "config.json").is_file() else str(Path(given) / "hf") for given in args.folders]
    problems = [
        f"{given}: no config.json there, nor in {given}/hf; give a Hugging Face folder, or OUT of a run that is finished"
        for given, folder in zip(args.folders, folders, strict=True)
        if not (Path(folder) / "config.json").is_file()
    ]
    ranges = (("tokens", args.tokens, 1, 2**31), ("temperature", args.temperature, 0, 1000), ("top-k", args.top_k, 1, 2**31),
              ("seed", args.seed, 0, 2**63 - 1))  # fmt: skip
    problems += [
        f"--{name} {value}: must be from {least} to {most:,}"
        for name, value, least, most in ranges
        if not least <= value <= most
    ]
    if any("\ud800" <= c <= "\udfff" for c in args.prompt or ""):
        problems.append("--prompt: is not UTF-8; give a text that is")
    if args.chat and not args.prompt:
        problems.append("--chat: there is no question; give --prompt TEXT")
    if problems:
        raise BadInput(problems)
    architectures = [architecture_of(folder) for folder in folders]
    writers = ("ForCausalLM", "LMHeadModel", "ForPreTraining", "ForMaskedLM", "ForConditionalGeneration")
    problems = [
        f"{folder}: is {architecture or 'of no class'}, which writes no text; python -m scripts.evaluate scores one with a head"
        for folder, architecture in zip(folders, architectures, strict=True)
        if not architecture.endswith(writers)
    ]
    problems += [
        f"--chat: {folder} is {architecture}, and conversations are for causal language models; leave it out"
        for folder, architecture in zip(folders, architectures, strict=True)
        if args.chat and architecture.endswith(writers[2:])
    ]
    if problems:
        raise BadInput(problems)
    for folder, architecture in zip(folders, architectures, strict=True):
        print(f"---- {folder}", flush=True)
        if architecture.endswith(("ForPreTraining", "ForMaskedLM")):
            print(fill(folder, args.prompt or "[MASK]"), flush=True)
        elif architecture.endswith("ForConditionalGeneration"):
            prompt = args.prompt or "<extra_id_0>"
            answer(folder, prompt, args.tokens, args.temperature, args.top_k, args.seed)
        else:
            go_on(folder, args.prompt, args.chat, args.tokens, args.temperature, args.top_k, args.seed)


LIKELIEST = 5


def fill(folder: str, prompt: str) -> str:
    """For each [MASK] of the prompt a line with its likeliest tokens and their probabilities."""
    import torch
    import transformers

    pair_head = ("bert.pooler.", "cls.seq_relationship.")  # of pretraining: says nothing of a [MASK]
    model, tokenizer = load(transformers.AutoModelForPreTraining, folder, may_lack=pair_head)
    given = tokenizer(prompt, return_tensors="pt")
    length, positions = given["input_ids"].shape[1], model.config.max_position_embeddings
    if length > positions:
        raise BadInput(f"--prompt: {length} tokens with [CLS] and [SEP], and the model has {positions} positions")
    refuse_unknown(int(given["input_ids"].max()), model, folder)
    places = (given["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten()
    if not len(places):
        raise BadInput(f"--prompt {prompt!r}: holds no {tokenizer.mask_token}, which is what this model fills in")
    with torch.no_grad():
        out = model(**given)
    logits = out.prediction_logits if "prediction_logits" in out else out.logits  # (1, T, V)
    lines = [prompt]
    for place in places:
        likely = logits[0, place].softmax(-1).topk(LIKELIEST)
        words = [f"{tokenizer.decode([i])} {p:.1%}" for p, i in zip(*map(torch.Tensor.tolist, likely), strict=True)]
        lines.append(f"  {tokenizer.mask_token}: {', '.join(words)}")
    return "\n".join(lines)


def drawn(temperature: float, top_k: int) -> dict[str, Any]:
    """How `generate` chooses a token."""
    return {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}


def answer(folder: str, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Print the prompt, and on a line of its own, as it comes, what an encoder-decoder model writes to it."""
    import torch
    import transformers

    model, tokenizer = load(transformers.AutoModelForSeq2SeqLM, folder)
    given = tokenizer(prompt, return_tensors="pt")
    refuse_unknown(int(given["input_ids"].max()), model, folder)
    print(prompt, end="\n  ")
    torch.manual_seed(seed)
    model.generate(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=tokens,
        streamer=transformers.TextStreamer(tokenizer), **drawn(temperature, top_k),
    )  # fmt: skip


def asked(tokenizer: Any, folder: str, question: str) -> tuple[str, set[int]]:
    """A question as the tokenizer's chat template puts it, and the ids with which the template ends an answer."""
    from tokenizers import Tokenizer as Backend

    from common.data.tokenizer import Tokenizer

    family = (read_object(Path(folder) / "twinstack.json") or {}).get("family")  # of an export
    module = families.module_of("finetune_samples", family, holding="class Template")
    if module is None:
        raise BadInput("--chat: no recipe here has conversations (finetune_samples.py with a Template); leave it out")
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise BadInput(f"{folder}: its tokenizer is none of the library `tokenizers`; leave out --chat")
    given = tokenizer.chat_template
    several = [{"name": name, "template": text} for name, text in given.items()] if isinstance(given, dict) else given
    config = {"chat_template": several} | {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    template = module.Template(Tokenizer(Backend.from_str(tokenizer.backend_tokenizer.to_str()), config), folder)
    chat = [{"role": "user", "content": question}]
    text, ends = template.prompt(chat, "--prompt"), None
    with contextlib.suppress(BadInput):  # one that writes earlier answers otherwise: generation_config.json has to know
        ends = template.end_ids([*chat, {"role": "assistant", "content": "Yes"}], "--prompt")
    return text, ends or set()


def go_on(folder: str, prompt: str, chat: bool, tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Print the prompt and what the model adds to it, as it comes; of a conversation the answer alone."""
    import torch
    import transformers

    model, tokenizer = load(transformers.AutoModelForCausalLM, folder)
    ends = model.generation_config.eos_token_id
    if chat:
        if not tokenizer.chat_template:
            raise BadInput(f"{folder}: its tokenizer has no chat template; leave out --chat")
        prompt, marks = asked(tokenizer, folder, prompt)
        ends = sorted(marks | set(ends if isinstance(ends, list) else [ends]) - {None}) or None
    how = {"add_special_tokens": not chat}  # a template has written them
    ids = tokenizer(prompt, return_tensors="pt", **how)["input_ids"] if prompt else torch.empty(1, 0, dtype=torch.long)
    if not ids.numel():  # begin where a document ended
        if model.config.eos_token_id is None:
            raise BadInput(f"{folder}: its tokenizer has no end of document to begin after; give --prompt TEXT")
        ids = torch.tensor([[model.config.eos_token_id]])
    refuse_unknown(int(ids.max()), model, folder)
    positions = model.config.max_position_embeddings
    room = positions - ids.shape[1]
    if room < 1:
        raise BadInput(f"--prompt: {ids.shape[1]} tokens, and the model has {positions} positions")
    if room < tokens:
        print(f"note: at most {room} tokens follow: the model has {positions} positions", file=sys.stderr, flush=True)
    torch.manual_seed(seed)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=min(tokens, room), pad_token_id=0, eos_token_id=ends,
        streamer=transformers.TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True), **drawn(temperature, top_k),
    )  # fmt: skip


if __name__ == "__main__":
    exit_cleanly(main)
