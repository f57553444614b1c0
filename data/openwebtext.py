"""OpenWebText (8,013,769 documents, about 9 billion of GPT-2's tokens): the open copy of GPT-2's training text.

One document in 2,000 goes to valid, as in nanoGPT, though not the same ones: ours are told by a hash of their text.
Streamed from the hub, or from --source, local folders of the dataset.

    python -m data.openwebtext corpora/owt
"""

from common.errors import exit_cleanly
from data import build, hub

NAME = "Skylion007/openwebtext"


def main() -> None:
    p = build.parser(__doc__, valid_share=0.0005, tokenizer="gpt2")
    p.add_argument("--source", metavar="PATH", nargs="+", help="local folders of the dataset (column: text) instead")
    args = p.parse_args()
    hub.run(args, "openwebtext", args.source or NAME, None, {None: "train"})


if __name__ == "__main__":
    exit_cleanly(main)
