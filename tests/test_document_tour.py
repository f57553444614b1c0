"""docs/quick_tour.md: which lines of an output are shown, and that each block of commands has one."""

from conftest import ROOT

from scripts import document_tour


def test_lines_that_are_shown() -> None:
    lines = ["1", "2", "3", "4", "5"]
    assert document_tour.shown(lines, "all") == lines
    assert document_tour.shown(lines, "first 1, last 2") == ["1", "...", "4", "5"]
    assert document_tour.shown(lines, "first 3, last 2") == lines
    assert document_tour.shown(lines, "first 0, last 1") == ["...", "5"]


def test_every_block_of_commands_shows_its_output() -> None:
    page = (ROOT / "docs/quick_tour.md").read_text(encoding="utf-8")
    blocks = list(document_tour.BLOCK.finditer(page))
    assert len(blocks) == page.count("```bash") - 1  # the installation has none
    assert all(block["output"].strip() for block in blocks)


def test_a_block_is_run_and_its_output_replaced(tmp_path) -> None:
    text = "```bash\necho one\necho two\necho $((1 + 2)) >&2\n```\n<!-- output: first 1, last 1 -->\n```\nold\n```\nend\n"
    assert document_tour.BLOCK.sub(lambda block: document_tour.ran(block, str(tmp_path)), text) == text.replace(
        "old", "one\n...\n3"
    )
