"""common/pictures.py: pictures read on a white and on a dark page, say what they show, and nothing in them lies on another."""

import re
from pathlib import Path

import pytest

from common import pictures
from scripts import benchmark, document_comparison

WHITE, DARK = "#ffffff", "#0d1117"  # pages of GitHub


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", [WHITE, DARK])
def test_text_and_lines_stand_out_from_both_pages(page: str) -> None:
    assert contrast(pictures.INK, page) > 4.2
    for colour in pictures.STACK_COLOURS.values():
        assert contrast(colour, page) > 3  # WCAG 1.4.11, graphical objects


def test_title_legend_and_axes_do_not_lie_on_each_other(tmp_path: Path) -> None:
    drawing, axes = pictures.new(height=2.0)
    axes.plot([1, 3], [1, 2], label="a run")
    axes.set(xlabel="step", ylabel="loss")
    drawing.legend(loc="outside lower center")
    pictures.label(drawing, "A title " * 10, "quickstart on 2 cores, no GPU, 2026-01-01 " * 3)
    drawing.draw_without_rendering()
    assert len(drawing.texts) == 2 and all("\n" in text.get_text() for text in drawing.texts)  # both wrapped
    boxes = [one.get_tightbbox() for one in (drawing.texts[0], axes, drawing.legends[0], drawing.texts[1])]
    edges = [edge for box in boxes for edge in (box.y1, box.y0)]
    assert edges == sorted(edges, reverse=True) and edges[-1] >= 0 and edges[0] <= drawing.bbox.height
    assert all(0 <= box.x0 and box.x1 <= drawing.bbox.width for box in boxes)
    pictures.save(drawing, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert ">step<" in text and not re.search(r"\d\.\d{3}", text) and "<dc:date>" not in text


def test_steps_are_whole_numbers() -> None:
    drawing, axes = pictures.new()
    axes.plot([1, 2, 3], [1, 2, 3])
    pictures.whole_numbers(axes)
    drawing.draw_without_rendering()
    assert {tick.get_text() for tick in axes.get_xticklabels()} <= {str(n) for n in range(5)}


def test_the_pictures_of_the_comparison_are_there_with_config_hardware_and_date() -> None:
    report = document_comparison.read()
    for picture in benchmark.pictures():
        text = (document_comparison.FOLDER / f"{picture.name}.svg").read_text(encoding="utf-8")
        assert (document_comparison.FOLDER / f"{picture.name}.png").is_file()
        assert picture.title in text.replace("&#x27;", "'") and report.date in text
        assert re.search("AMD EPYC|H100|A100|any hardware", text), picture.name
