"""Generate text with plain transformers: GPT continues a text, BERT fills in [MASK], and T5 fills in <extra_id_0> or answers.

python -m scripts.generate MODEL... [--prompt TEXT] [--chat] [--tokens N] [--temperature T] [--top-k K] [--seed N]

MODEL is an OUT folder of pretrain.sh or finetune.sh (its export, OUT/hf, is loaded), or any causal, masked or encoder-decoder
language model in Hugging Face form. The same weights and seed give the same text. A masked model uses only --prompt, a text
with [MASK], and prints the likeliest tokens for each mask. With --chat the prompt is a question. The tokenizer's chat template
formats it, as in the training of a model that was finetuned on conversations (sft).
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

from common import families
from common.command_line import Parser
from common.errors import BadInput, exit_cleanly
from common.huggingface.pretrained import architecture_of, load, refuse_unknown
from common.json_files import read_object
from common.paths import near


def main() -> None:
    parser = Parser(prog="python -m scripts.generate", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="MODEL")
    parser.add_argument("--prompt", metavar="TEXT", default="", help="beginning of the text (default: that of a document)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a question in a conversation")
    parser.add_argument("--tokens", metavar="N", type=int, default=64, help="tokens to generate (default: %(default)s)")
    help_text = "0 takes the likeliest token each time (default: %(default)s)"
    parser.add_argument("--temperature", metavar="T", type=float, default=0.7, help=help_text)
    help_text = "choose among the K likeliest tokens (default: %(default)s)"
    parser.add_argument("--top-k", metavar="K", type=int, default=20, help=help_text)
    parser.add_argument("--seed", metavar="N", type=int, default=1234, help="default: %(default)s")
    args = parser.parse_args()
    folders = [path if (Path(path) / "config.json").is_file() else str(Path(path) / "hf") for path in args.folders]
    problems = [
        f"{path}: no config.json there, nor in {path}/hf; give a Hugging Face folder, or OUT of a run that is finished"
        if Path(path).exists()
        else f"{path}: no such folder;{near(path, '')} give a Hugging Face folder, or OUT of a run that is finished"
        for path, folder in zip(args.folders, folders, strict=True)
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
    generating = ("ForCausalLM", "LMHeadModel", "ForPreTraining", "ForMaskedLM", "ForConditionalGeneration")
    problems = [
        f"{folder}: is {architecture or 'of no class'}, which writes no text; python -m scripts.evaluate scores one with a head"
        for folder, architecture in zip(folders, architectures, strict=True)
        if not architecture.endswith(generating)
    ]
    problems += [
        f"--chat: {folder} is {architecture}, and conversations are for causal language models; leave it out"
        for folder, architecture in zip(folders, architectures, strict=True)
        if args.chat and architecture.endswith(generating[2:])
    ]
    if problems:
        raise BadInput(problems)
    for folder, architecture in zip(folders, architectures, strict=True):
        print(f"---- {folder}", flush=True)
        if architecture.endswith(("ForPreTraining", "ForMaskedLM")):
            print(fill_masks(folder, args.prompt or "[MASK]"), flush=True)
        elif architecture.endswith("ForConditionalGeneration"):
            prompt = args.prompt or "<extra_id_0>"
            print_output(folder, prompt, args.tokens, args.temperature, args.top_k, args.seed)
        else:
            continue_text(folder, args.prompt, args.chat, args.tokens, args.temperature, args.top_k, args.seed)


LIKELIEST = 5


def fill_masks(folder: str, prompt: str) -> str:
    """The prompt, and one line per [MASK] with its likeliest tokens and their probabilities."""
    import torch
    import transformers

    pair_head = ("bert.pooler.", "cls.seq_relationship.")  # the sentence-pair head of pretraining does not affect a [MASK]
    model, tokenizer = load(transformers.AutoModelForPreTraining, folder, may_lack=pair_head)
    inputs = tokenizer(prompt, return_tensors="pt")
    length, positions = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if length > positions:
        raise BadInput(f"--prompt: {length} tokens with [CLS] and [SEP], and the model has {positions} positions")
    refuse_unknown(int(inputs["input_ids"].max()), model, folder)
    mask_positions = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten()
    if not len(mask_positions):
        raise BadInput(f"--prompt {prompt!r}: holds no {tokenizer.mask_token}, which is what this model fills in")
    with torch.no_grad():
        out = model(**inputs)
    logits = out.prediction_logits if "prediction_logits" in out else out.logits  # (1, T, V)
    lines = [prompt]
    for position in mask_positions:
        likely = logits[0, position].softmax(-1).topk(LIKELIEST)
        words = [f"{tokenizer.decode([i])} {p:.1%}" for p, i in zip(*map(torch.Tensor.tolist, likely), strict=True)]
        lines.append(f"  {tokenizer.mask_token}: {', '.join(words)}")
    return "\n".join(lines)


def sampling_arguments(temperature: float, top_k: int) -> dict[str, Any]:
    """The arguments of `generate` that decide how a token is chosen."""
    return {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}


def print_output(folder: str, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Print the prompt and, on the next line, the output of an encoder-decoder model, token by token."""
    import torch
    import transformers

    model, tokenizer = load(transformers.AutoModelForSeq2SeqLM, folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    refuse_unknown(int(inputs["input_ids"].max()), model, folder)
    print(prompt, end="\n  ")
    torch.manual_seed(seed)
    model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=tokens,
        streamer=transformers.TextStreamer(tokenizer), **sampling_arguments(temperature, top_k),
    )  # fmt: skip


def format_question(tokenizer: Any, folder: str, question: str) -> tuple[str, set[int]]:
    """A question in the format of the tokenizer's chat template, and the ids with which the template ends an answer."""
    from tokenizers import Tokenizer as Backend

    from common.data.tokenizer import Tokenizer

    family = (read_object(Path(folder) / "twinstack.json") or {}).get("family")  # None if the folder is not an export of a run
    module = families.module_of("finetune_samples", family, holding="class Template")
    if module is None:
        raise BadInput("--chat: no recipe here has conversations (finetune_samples.py with a Template); leave it out")
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise BadInput(f"{folder}: its tokenizer is not one of the library `tokenizers`; leave out --chat")
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        templates = [{"name": name, "template": text} for name, text in templates.items()]
    config = {"chat_template": templates} | {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    template = module.Template(Tokenizer(Backend.from_str(tokenizer.backend_tokenizer.to_str()), config), folder)
    chat = [{"role": "user", "content": question}]
    text, ends = template.prompt(chat, "--prompt"), None
    with contextlib.suppress(BadInput):  # a template that changes earlier answers: generation_config.json must have the ids
        ends = template.end_ids([*chat, {"role": "assistant", "content": "Yes"}], "--prompt")
    return text, ends or set()


def continue_text(folder: str, prompt: str, chat: bool, tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Print the prompt and the model's continuation, token by token. In a conversation, print only the answer."""
    import torch
    import transformers

    model, tokenizer = load(transformers.AutoModelForCausalLM, folder)
    ends = model.generation_config.eos_token_id
    if chat:
        if not tokenizer.chat_template:
            raise BadInput(f"{folder}: its tokenizer has no chat template; leave out --chat")
        prompt, template_ends = format_question(tokenizer, folder, prompt)
        ends = sorted(template_ends | set(ends if isinstance(ends, list) else [ends]) - {None}) or None
    how = {"add_special_tokens": not chat}  # a chat template has added them already
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
        streamer=transformers.TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True),
        **sampling_arguments(temperature, top_k),
    )  # fmt: skip


if __name__ == "__main__":
    exit_cleanly(main)
