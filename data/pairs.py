"""Text-to-text tasks for T5: JSON lines of input and target.

Blended with running text, such corpora make a mixture of tasks. Each line is
an object such as {"input": "...", "target": "..."}; --input-key and
--target-key name other fields, and --prefix names the task. A document is two
sequences, input and target, which T5 truncates to data.seq_len - 1 and
data.target_len - 1 tokens.

    python -m data.pairs corpora/en_de --source en_de.jsonl --input-key en \\
        --target-key de --prefix "translate English to German: " \\
        --tokenizer t5
"""

from dataclasses import replace

from common.errors import BadInput, exit_cleanly
from data import build
from data.sources import BETWEEN, Pairs


def main() -> None:
    p = build.parser(__doc__, valid_share=0.01, tokenizer_type="sentencepiece", sentences=None)
    p.add_argument("--source", metavar="PATH", nargs="+", required=True, help="files and folders of JSON lines")
    p.add_argument("--input-key", metavar="KEY", default="input", help="field of the input (default: %(default)s)")
    p.add_argument("--target-key", metavar="KEY", default="target", help="field of the target (default: %(default)s)")
    p.add_argument("--prefix", metavar="TEXT", default="", help="text before every input (default: none)")
    args = p.parse_args()
    if BETWEEN in args.prefix:
        raise BadInput("--prefix: contains U+001E, which separates input and target in the corpus")
    try:
        args.prefix.encode()
    except UnicodeEncodeError:
        raise BadInput(f"--prefix {args.prefix!r}: not UTF-8") from None
    if args.split_by == "tail":
        raise BadInput("--split-by tail: a pair cannot be cut; leave the option out, and whole pairs go to a split")
    opt = replace(build.options(args, "pairs"), pairs=True, append_eod=False)
    build.build(opt, Pairs(args.source, args.input_key, args.target_key, args.prefix, args.max_document_mb))


if __name__ == "__main__":
    exit_cleanly(main)
