"""docs/architecture.md: its picture is drawn from today's imports, and what the page says of them is true."""

from conftest import ROOT

from scripts import document_architecture


def test_the_picture_is_that_of_the_code() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert "flowchart" in text
    assert text == document_architecture.page(text), "type: python -m scripts.document_architecture"


def test_what_the_page_says() -> None:
    arrows, libraries = document_architecture.imports()
    stacks = document_architecture.STACKS
    assert [(one, other) for one, other in arrows if other in stacks and one != "scripts"] == []
    assert [(part, library) for part, library in libraries if part == "family" and library in ("deepspeed", "megatron")] == []
    assert {one for one, other in arrows if other == "family"} == {*stacks, "scripts"}
    assert {part for part, library in libraries if library == "megatron"} >= {"megatron", "stacks"}
    assert ("baseline", "stacks") not in arrows and {("deepspeed", "stacks"), ("megatron", "stacks")} <= set(arrows)
    assert ("deepspeed", "megatron") not in libraries and ("megatron", "deepspeed") not in libraries
