"""A text dataset from the Hugging Face hub, or a local copy.

Any dataset with a column of text will do. It is streamed from the hub.

    python -m data.hub corpora/wikitext103 --name Salesforce/wikitext \\
        --config wikitext-103-raw-v1 --valid-split validation \\
        --test-split test --tokenizer gpt2
    python -m data.hub corpora/mine --name ./my_dataset --valid-share 0.01 \\
        --vocab-size 16384
"""

import argparse
import os
from collections.abc import Sequence

from common.errors import BadInput, exit_cleanly
from data import build
from data.sources import Hub


def run(
    args: argparse.Namespace,
    corpus: str,
    names: str | Sequence[str],
    config: str | None,
    splits: dict[str | None, str],
    text_key: str = "text",
) -> None:
    """Build from a dataset.

    names: on the hub, or folders of --source. splits: split of the corpus (None: shares decide) -> split of the dataset.
    """
    for path in args.source or ():
        if not os.path.isdir(path):
            raise BadInput(
                f"--source {path}: no such folder; give a folder of the dataset (for text files: python -m data.text)"
            )
    opt = build.options(args, corpus)
    build.build(opt, Hub(names, config, list(splits.items()), text_key, opt.max_document_mb))


def main() -> None:
    p = build.parser(__doc__, valid_share=0.005)
    given = p.add_mutually_exclusive_group(required=True)
    given.add_argument("--name", metavar="NAME_OR_DIR", help="the dataset, on the hub or in a local folder")
    given.add_argument("--source", metavar="PATH", nargs="+", help="local folders of the dataset instead")
    p.add_argument("--config", metavar="NAME", help="configuration of the dataset, if it has several")
    p.add_argument("--split", metavar="NAME", default="train", help="split to take (default: %(default)s)")
    p.add_argument("--valid-split", metavar="NAME", help="take this split as valid, instead of a share of --split")
    p.add_argument("--test-split", metavar="NAME", help="take this split as test")
    p.add_argument("--text-key", metavar="KEY", default="text", help="column with the text (default: %(default)s)")
    args = p.parse_args()
    splits: dict[str | None, str] = {None: args.split}
    if args.valid_split or args.test_split:
        args.valid_share = args.test_share = 0.0
        named = {"valid": args.valid_split, "test": args.test_split, "train": args.split}
        splits = {split: hub_split for split, hub_split in named.items() if hub_split}
    run(args, "hub", args.source or args.name, args.config, splits, args.text_key)


if __name__ == "__main__":
    exit_cleanly(main)
