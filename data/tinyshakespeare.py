"""Tiny Shakespeare (1.1 MB, public domain), as in nanoGPT.

One text: the first 90% of its characters are train, the rest is valid, and
there is no end of document. With characters (65 ids) that is 1,003,854 and
111,540 tokens, with --tokenizer gpt2 301,966 and 36,059. It is downloaded, or
read from --source (the file input.txt or its folder).

    python -m data.tinyshakespeare corpora/shakespeare_char
"""

import hashlib
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from common.errors import BadInput, exit_cleanly
from data import build
from data.sources import Files

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def cut(text: str, raw: bytes) -> build.Cut:
    """nanoGPT's split: by characters, not at a line end."""
    bound = int(len(text) * 0.9)
    return [("train", text[:bound]), ("valid", text[bound:])]


def find(source: Sequence[str] | None, download_to: Path) -> list[Path]:
    """The text: a file of --source, or input.txt in a folder of --source, or a download that is stored beside OUT."""
    if source is not None:
        paths = [(Path(path), Path(path) / "input.txt") for path in source]
        return [text if os.path.isfile(text) else path for path, text in paths]
    if not download_to.is_file():
        try:
            with urllib.request.urlopen(URL, timeout=30) as response:
                content = response.read()
        except OSError as error:
            raise BadInput(f"{URL} cannot be fetched ({error}); give the file with --source FILE") from None
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise BadInput(f"{URL}: the download ({len(content):,} bytes) is not the known text; give --source FILE")
        download_to.parent.mkdir(parents=True, exist_ok=True)
        download_to.write_bytes(content)
    return [download_to]


def main() -> None:
    p = build.parser(__doc__, valid_share=None, tokenizer="char")
    p.add_argument("--source", metavar="PATH", nargs="+", help="input.txt, or its folder, instead of a download")
    args = p.parse_args()
    opt = build.options(args, "tinyshakespeare")
    opt.shares = {"valid": 0.1}
    opt.append_eod = False
    texts = find(args.source, args.out.parent / "tinyshakespeare.txt")
    build.build(opt, Files(texts, max_document_mb=args.max_document_mb), cut)


if __name__ == "__main__":
    exit_cleanly(main)
