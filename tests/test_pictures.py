"""common/pictures.py: pictures read on a white and on a dark page, say what they show, and nothing in them lies on another."""

import json
import re
from pathlib import Path

import pytest

from common import pictures
from scripts import benchmark, document_comparison, plot

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


def run(folder: Path, losses: list[float], **info: object) -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "run.json").write_text(json.dumps(info))
    return folder


def words_of(svg: Path) -> str:
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text(encoding="utf-8")))


def test_curves_say_where_runs_are_equal_and_what_made_them(tmp_path: Path) -> None:
    facts = {"family": "gpt", "config": "tiny", "date": "2026-01-02", "hardware": "8 x H100"}
    one = run(tmp_path / "one", [3.0, 2.0, 1.0], stack="baseline", **facts)
    other = run(tmp_path / "other", [3.0, 2.0 + 1e-4, 1.0], stack="megatron", **facts)
    plot.draw({"one": one, "other": other}, tmp_path / "a.png")
    words = words_of(tmp_path / "a.svg")
    assert "difference to one: at most 1.0e-04 (other, step 2)" in words and "equal losses, as logged: other 2" in words
    assert "equal" in words.split() and "gpt tiny; 2026-01-02, 8 x H100" in words
    assert set(pictures.STACK_COLOURS.values()) & set(plot.colours([one, other])) == {"#009e73", "#d55e00"}
    same = run(tmp_path / "same", [3.0, 2.0, 1.0])
    plot.draw({"one": one, "same": same}, tmp_path / "b.png")
    assert "at most 0.0e+00" in words_of(tmp_path / "b.svg") and "equal losses, as logged: same 3" in words_of(
        tmp_path / "b.svg"
    )
    plot.draw({"same": same}, tmp_path / "c.svg")
    assert "hardware not recorded" in words_of(tmp_path / "c.svg") and "difference" not in words_of(tmp_path / "c.svg")
    assert len(set(plot.colours([one, one, one, one, one, one]))) == 6
