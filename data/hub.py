"""Any dataset of the Hugging Face hub with a column of text, streamed, or a local folder of one.

    python -m data.hub corpora/wikitext103 --name Salesforce/wikitext --config wikitext-103-raw-v1 \\
        --valid-split validation --test-split test --tokenizer gpt2
    python -m data.hub corpora/mine --name ./my_dataset --valid-share 0.01 --vocab-size 16384
"""

import argparse

from common.errors import exit_cleanly
from data import build
from data.sources import Hub


def run(
    args: argparse.Namespace,
    corpus: str,
    name: str,
    config: str | None,
    splits: dict[str | None, str],
    text_key: str = "text",
) -> None:
    """Build from a dataset. splits: our split (None: shares decide) -> theirs."""
    opt = build.options(args, corpus)
    build.build(opt, Hub(name, config, list(splits.items()), text_key))


def main() -> None:
    p = build.parser(__doc__, valid_share=0.005)
    p.add_argument("--name", "--source", dest="name", metavar="NAME_OR_DIR", required=True, help="of the dataset")
    p.add_argument("--config", metavar="NAME", help="of the dataset, where it has several")
    p.add_argument("--split", metavar="NAME", default="train", help="to take (default: %(default)s)")
    p.add_argument("--valid-split", metavar="NAME", help="take this split as valid, and no share of --split")
    p.add_argument("--test-split", metavar="NAME", help="take this split as test")
    p.add_argument("--text-key", metavar="KEY", default="text", help="column with the text (default: %(default)s)")
    args = p.parse_args()
    splits: dict[str | None, str] = {None: args.split}
    if args.valid_split or args.test_split:
        args.valid_share = args.test_share = 0.0
        named = {"valid": args.valid_split, "test": args.test_split, "train": args.split}
        splits = {ours: theirs for ours, theirs in named.items() if theirs}
    run(args, "hub", args.name, args.config, splits, args.text_key)


if __name__ == "__main__":
    exit_cleanly(main)
