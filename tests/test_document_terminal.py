"""docs/terminal.md: its captures are there, have no line too long and no name of a machine, and read on their background."""

import re
import shutil
import socket
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from rich.text import Text
from test_pictures import contrast

from common.errors import BadInput
from scripts import document_terminal as terminal

FILES = sorted(terminal.FOLDER.glob("*.svg"))


def pieces(file: Path) -> list[tuple[float, float, str]]:
    """(column, row, text) of each piece of a capture."""
    texts = ElementTree.parse(file).getroot().iter("{http://www.w3.org/2000/svg}text")
    return [(float(t.attrib["x"]) / terminal.CELL - 1, float(t.attrib["y"]) / terminal.LINE - 1.5, t.text or "") for t in texts]


def test_the_page_shows_every_capture() -> None:
    page = terminal.PAGE.read_text(encoding="utf-8")
    assert page == terminal.page(), "type: python -m scripts.document_terminal --source DIR"
    shown = set(re.findall(r'"terminal/([^"]+)"', page))
    assert shown == {file.name for file in FILES} and len(shown) == len(terminal.CAPTURES) * 4


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_capture_is_as_wide_as_its_terminal_and_names_no_machine(file: Path) -> None:
    width, theme = file.stem.split("_")[-2:]
    found = pieces(file)
    assert found and max(column + len(text) for column, _, text in found) <= int(width) + 1e-6
    text = "\n".join(text for *_, text in found)
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|usr|mnt)/", text) and socket.gethostname() not in text
    other = "dark" if theme == "light" else "light"
    assert found == pieces(file.with_name(file.name.replace(theme, other)))


@pytest.mark.parametrize("theme", terminal.THEMES)
def test_every_colour_that_the_commands_use_reads_on_both_backgrounds(theme: str) -> None:
    ink, background, colours = terminal.THEMES[theme]
    used = {ink, *(colours[number - 30] for number in (31, 32, 36))}  # of common/screen.py
    assert all(contrast(colour, background) > 4.5 for colour in used)


def test_pieces_stand_where_the_terminal_has_them() -> None:
    line = Text.from_ansi("\x1b[31merror:\x1b[0m <a>  b")
    colours = terminal.THEMES["light"][2]
    assert terminal.spans(line, colours) == [(0, "error:", f' fill="{colours[1]}"'), (7, "<a>  b", "")]
    drawn = terminal.svg([line], 20, "light")
    assert "&lt;a&gt;" in drawn and ElementTree.fromstring(drawn) is not None


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
def test_a_terminal_is_captured_with_its_colours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = r"printf '\033[31merror:\033[0m here\n\033[2ma\nb\033[0m\n'; printf '%090d\n' 7; tput cols; (exit 3)"
    capture = terminal.Capture("x", "X", words, code=3)
    lines = terminal.captured(capture, 80, tmp_path)
    assert [line.plain for line in lines] == ["error: here", "a", "b", "0" * 80, "0" * 9 + "7", "80"]
    styles = [terminal.spans(line, terminal.THEMES["dark"][2])[0][2] for line in lines]
    assert styles == [' fill="#ff7b72"', ' opacity="0.7"', ' opacity="0.7"', "", "", ""]
    assert "longer than 80 columns: 0000" in capsys.readouterr().err
    with pytest.raises(BadInput, match="does not exit with 0; "):
        terminal.captured(capture._replace(code=0), 80, tmp_path)
    shown = terminal.cut(lines, capture._replace(first=1, last=1))
    assert [line.plain for line in shown] == ["error: here", "...", "80"]
