"""C4, English (364,868,892 documents): T5's training text.

The dataset's validation split becomes valid. It is streamed from the hub, or
read from --source, local folders of the dataset with both splits. --max-mb
takes the first MB of each split. T5 takes its own SentencePiece (--tokenizer
t5), GPT takes gpt2.

    python -m data.c4 corpora/c4 --tokenizer t5 --max-mb 1000
"""

from common.errors import exit_cleanly
from data import build, hub

NAME = "allenai/c4"


def main() -> None:
    p = build.parser(__doc__, valid_share=None)
    p.add_argument("--source", metavar="PATH", nargs="+", help="local folders of the dataset (column: text) instead")
    args = p.parse_args()
    config = None if args.source else "en"
    hub.run(args, "c4", args.source or NAME, config, {"valid": "validation", "train": "train"})


if __name__ == "__main__":
    exit_cleanly(main)
