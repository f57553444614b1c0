"""Write docs/claims.md: what articles claim about DeepSpeed and Megatron, where it comes from, and whether it is true.

python -m scripts.document_claims

The claims and their sources are in common/comparison/claims.py, our figures in docs/comparison; a test compares the page with
both.
"""

from common.command_line import Parser
from common.comparison import claims
from common.paths import ROOT
from scripts import document_comparison

PAGE = ROOT / "docs/claims.md"


def main() -> None:
    Parser(prog="python -m scripts.document_claims", description=__doc__).parse_args()
    PAGE.write_text(claims.page(document_comparison.read().figures), encoding="utf-8")


if __name__ == "__main__":
    main()
