"""Your own text: files and folders of text or JSON lines.

A text file is one document, or with --split-documents each of its lines or
each paragraph between blank lines is one; in JSON lines (.jsonl, .ndjson) each
line is a document. Files may be compressed (.gz, .zst). A folder is searched
for the usual suffixes of text; a file given by name may have any suffix. Text
is taken exactly as stored, without a byte order mark.

    python -m data.text corpora/books --source books/ --tokenizer gpt2
    python -m data.text corpora/mine --source dump.jsonl.zst \\
        --text-key content --vocab-size 16384
    python -m data.text corpora/t5 --source books/ \\
        --tokenizer-type sentencepiece --vocab-size 8192
"""

from common.errors import exit_cleanly
from data import build
from data.sources import Files


def main() -> None:
    p = build.parser(__doc__, valid_share=0.01)
    p.add_argument("--source", metavar="PATH", nargs="+", required=True, help="files and folders")
    p.add_argument("--text-key", metavar="KEY", default="text", help="field of JSON lines (default: %(default)s)")
    text = "how a text file is split into documents (default: none)"
    p.add_argument("--split-documents", choices=("none", "blank-line", "line"), default="none", help=text)
    args = p.parse_args()
    build.build(build.options(args, "text"), Files(args.source, args.text_key, args.split_documents, args.max_document_mb))


if __name__ == "__main__":
    exit_cleanly(main)
