"""The tables of layouts in the documents are those of tests/layouts.json, which the comparisons with the plain loops filled."""

import pytest
import test_parity
import test_t5_parity
from test_parity import LOSS, NORM

from tests import layout_table


@pytest.mark.parametrize("path", layout_table.PAGES, ids=lambda path: str(path.relative_to(layout_table.ROOT)))
def test_documents_show_what_was_measured(path):
    text = path.read_text(encoding="utf-8")
    assert layout_table.TABLE.search(text), "a page of layouts has a table"
    assert layout_table.page(text) == text, "type: python -m tests.layout_table"


def test_the_readme_tells_the_largest_difference():
    largest = max(row["loss"] for row in layout_table.recorded() if "bf16" not in row["kind"])
    text = " ".join((layout_table.ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"The largest difference measured there is {largest:.1e}.".replace("e-0", "e-") in text


def test_every_row_is_within_the_bounds():
    rows = layout_table.recorded()
    assert len({layout_table.identity(row) for row in rows}) == len(rows) > 100
    for row in rows:
        bf16 = "bf16" in row["kind"]
        of_bf16 = (test_t5_parity if row["family"] == "t5" else test_parity).BF16
        assert 0 <= row["loss"] <= (of_bf16 if bf16 else LOSS) and (bf16 or row["norm"] <= NORM), row
