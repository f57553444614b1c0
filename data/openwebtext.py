"""OpenWebText (8,013,769 documents): a copy of GPT-2's text.

About 9 billion of GPT-2's tokens. One document in 2,000 goes to valid, as in
nanoGPT, but not the same documents: here a hash of the text decides. The
dataset is streamed from the hub, or read from --source, local folders of it.

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
