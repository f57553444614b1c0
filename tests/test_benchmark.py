"""scripts/benchmark.py: its parts, what it keeps and refuses, and the three forms of its report."""

import json
import re
from pathlib import Path

import pytest

from common import pictures
from common.comparison import render
from common.comparison.figures import Disagreement, Figure, Options, Picture, Report, Task, tables
from common.errors import BadInput
from scripts import benchmark

COMMAND = "python -m scripts.benchmark --parts speed"


def figure(subject: str, metric: str, value: object, unit: str = "", **more: object) -> Figure:
    values = {"section": "Performance / GPT", "kind": "measured", "source": COMMAND} | more
    return Figure(subject=subject, metric=metric, value=value, unit=unit, **values)  # type: ignore[arg-type]


SPEED = [
    figure("baseline", "tokens/s", 11_123.4),
    figure("baseline", "of baseline", 1.0, spread=(1.0, 1.0)),
    figure("deepspeed zero_stage=3 <b>", "tokens/s", 7_123.4),
    figure("deepspeed zero_stage=3 <b>", "of baseline", 0.6404, spread=(0.61, 0.66)),
    figure("deepspeed zero_stage=3 <b>", "GB/step", 3, "GB", kind="counted"),
]


def drawing(found: object) -> object:
    made, axes = pictures.new()
    axes.bar(["a", "b"], [1, 2])
    axes.set_ylabel("ratio")
    return made


def report(figures: list[Figure]) -> Report:
    return Report(COMMAND, "2026-01-01", "abc", "2 cores", {"torch": "2.15"}, figures, ["megatron: left out: no recipe has it"])


# ---- figures and tables


@pytest.mark.parametrize(
    "wrong", [{"kind": "guessed"}, {"source": " "}, {"value": float("nan")}], ids=["kind", "source", "not finite"]
)
def test_a_figure_without_kind_or_source_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Performance / GPT / a / b"):
        Figure(**({"section": "Performance / GPT", "subject": "a", "metric": "b", "value": 1.0, "unit": "", "kind": "measured",
                   "source": COMMAND} | wrong))  # type: ignore[arg-type]  # fmt: skip


def test_a_column_has_one_kind_and_a_cell_one_figure() -> None:
    [table] = tables(SPEED)
    assert table.rows == ["baseline", "deepspeed zero_stage=3 <b>"] and table.columns == ["tokens/s", "of baseline", "GB/step"]
    with pytest.raises(ValueError, match="two figures"):
        tables([*SPEED, SPEED[0]])
    with pytest.raises(ValueError, match="measured in '' and predicted in ''"):
        tables([*SPEED, figure("megatron", "tokens/s", 1.0, kind="predicted")])


def test_sources_are_named_once_by_column_or_row_or_cell() -> None:
    found = [
        figure("a", "s", 1.0), figure("b", "s", 2.0), figure("a", "x", 1.0, source="1"), figure("a", "y", 1.0, source="1"),
        figure("a", "z", None, source="too large"), figure("b", "x", 1.0, source="2"), figure("b", "y", 1.0, source="3"),
        figure("b", "z", None, source="too large"), figure("c", "z", 1.0, source="4"),
    ]  # fmt: skip
    assert render.sources(*tables(found)) == [
        ("s", COMMAND), ("a", "1"), ("a, z; b, z", "too large"), ("b, x", "2"), ("b, y", "3"), ("c", "4"),
    ]  # fmt: skip


def test_a_report_is_read_back_whole() -> None:
    written = report(SPEED).to_json()
    assert Report.from_json(json.loads(json.dumps(written))) == report(SPEED)
    assert set(written["figures"][0]) == {"section", "subject", "metric", "value", "unit", "kind", "spread", "source"}


# ---- the three forms


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_no_line_too_long_and_no_number_cut(width: int) -> None:
    wide = SPEED + [figure(row, f"column {i}", 1234.5 + i, "ms") for row in ("baseline", "megatron") for i in range(12)]
    wide += [figure("baseline", "flags", "micro_batch=4 tp=2 sequence_parallel=true distributed_optimizer=true pp=4 of eight")]
    text = render.terminal(report(wide), width)
    assert max(len(line) for line in text.splitlines()) <= width
    for value in [render.cell(one) for one in wide if not isinstance(one.value, str)]:
        assert re.search(rf"(?<![\d,.]){re.escape(value.partition(' ')[0])}(?![\d,.])", text), value
    assert "megatron: left out: no recipe has it" in text


def test_every_table_names_its_kind_and_its_command() -> None:
    for written in (render.markdown(report(SPEED), []), render.html(report(SPEED), [])):
        assert "counted" in written and "measured" in written and COMMAND in written
        assert "0.640 [0.610 .. 0.660]" in written and "megatron: left out" in written
    assert "<b>abc" not in render.html(report(SPEED), []) and "&lt;b&gt;" in render.html(report(SPEED), [])


def test_a_table_with_many_columns_of_few_rows_is_turned() -> None:
    wide = [figure(row, f"m{i}", i) for row in ("deepspeed", "megatron") for i in range(9)]
    grid = render.grid(tables(wide)[0])
    assert grid.head == ["", "deepspeed", "megatron"] and grid.body[3] == ["m3 (measured)", "3", "3"]


def test_the_page_needs_no_network_and_its_pictures_take_its_colours(tmp_path: Path) -> None:
    both = [
        Picture("bars", "Performance", "Two bars", "tiny on {hardware}", "Bars.", drawing),
        Picture("none", "Performance", "None", "tiny", "None.", lambda found: None),
    ]  # type: ignore[arg-type,return-value]
    drawn = render.draw(both, report(SPEED), tmp_path)
    assert [one.png for one in drawn] == ["bars.png"] and (tmp_path / "bars.png").stat().st_size > 1000
    page = render.html(report(SPEED), drawn)
    assert not re.search(r'(src|href)="(?!#)|@import|url\((?!#)', page)
    assert "currentColor" in page and pictures.INK not in page
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and all(f"#{link}" for link in re.findall(r'href="#([^"]+)"', page))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert "[![Bars.](bars.png)](bars.svg)" in render.markdown(report(SPEED), drawn)


# ---- the parts


def part(name: str, calls: list[str], fails: Exception | None = None) -> Task:
    def run(options: Options, folder: Path) -> list[Figure]:
        calls.append(name)
        if fails:
            raise fails
        return [figure(name, "tokens/s", 1.0)]

    return Task(name, "Performance", 1.0, run)


def begin(out: Path, *words: str) -> tuple[Options, Report]:
    options = Options(out=out, words=words)
    out.mkdir(exist_ok=True)
    return options, report([])


def test_an_interrupted_report_continues_and_another_commit_begins_again(tmp_path: Path) -> None:
    calls: list[str] = []
    options, made = begin(tmp_path / "out")
    with pytest.raises(Disagreement):
        benchmark.run([part("a", calls), part("b", calls, Disagreement("step 3"))], options, made, None)
    options, made = begin(tmp_path / "out", "--parts", "a", "b", "--rounds", "3")
    benchmark.run([part("a", calls)], Options(out=options.out, words=()), made, None)
    assert calls == ["a", "b"] and [f.subject for f in made.figures] == ["a"]
    options, made = begin(tmp_path / "out", "--rounds", "5")
    benchmark.run([part("a", calls)], options, made, None)
    assert calls == ["a", "b", "a"]  # other rounds are other figures
    options, made = begin(tmp_path / "out", "--rounds", "5")
    made.commit = "def"
    benchmark.run([part("a", calls)], options, made, None)
    assert calls == ["a", "b", "a", "a"]
    made.commit = "ghi"
    benchmark.run([part("a", calls), part("c", calls)], options, made, None, keep=True)
    assert calls == ["a", "b", "a", "a", "c"] and made.commit == "def; part c at ghi"


def test_what_cannot_be_run_is_left_out_with_a_line_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    options, made = begin(tmp_path / "out")
    parts = [part("a", calls, BadInput("needs --source")), part("b", calls)]
    benchmark.run(parts, options, made, None)
    assert made.left_out[-1] == "a: left out: needs --source" and [f.subject for f in made.figures] == ["b"]
    benchmark.run(parts, options, report([]), None)
    assert calls == ["a", "b", "a"]
    made = report([])
    benchmark.run([part("c", calls)], options, made, 0.001)
    assert "c" not in calls and made.left_out[-1].startswith("c: left out: needs about 1 s, more than --minutes 0.001")
    assert "[1/2] a" in capsys.readouterr().out


def test_words_that_do_not_change_the_figures() -> None:
    words = ("--parts", "a", "b", "--rounds", "3", "--out", "x", "--minutes=4", "c.yaml", "--all", "--keep")
    assert benchmark.without_out(words) == ("--parts", "a", "b", "--rounds", "3", "c.yaml")
    assert benchmark.part_words(Options(words=benchmark.without_out(words))) == ("--rounds", "3", "c.yaml")


def test_the_command_of_a_report_has_no_path_of_this_machine() -> None:
    for words in (("--source", "/home/me/data"), ("--source=/home/me/data",)):
        assert re.fullmatch(
            r"python -m scripts.benchmark --source[ =]DIR --rounds 3", Options(words=(*words, "--rounds", "3")).command
        )


def test_bad_input_is_one_line_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["nothing.yaml", "--rounds", "0", "--processes", "0", "--minutes", "0", "--source", str(tmp_path / "none")]
    with pytest.raises(BadInput) as caught:
        benchmark.options_of(benchmark.parser().parse_args([*words, "--out", str(tmp_path)]))
    assert len(caught.value.problems) == 5
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "deepspeed" else object())
    there, left_out = benchmark.installed(["baseline", "deepspeed"])
    assert there == ("baseline",) and left_out == [
        "deepspeed: left out: deepspeed is not installed; bash scripts/setup.sh installs it"
    ]


def test_the_parts_of_this_repository() -> None:
    names = [task.name for task in benchmark.tasks()]
    assert len(names) == len(set(names)) and all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)
    assert {task.section.partition(" / ")[0] for task in benchmark.tasks()} <= set(benchmark.ORDER)
    drawn = [picture.name for picture in benchmark.pictures()]
    assert len(drawn) == len(set(drawn)) and all(picture.draw([]) is None for picture in benchmark.pictures())


def test_the_answers_come_first() -> None:
    last, first = figure("a", "b", 1), figure("a", "b", 1, section="Verdict")
    assert benchmark.in_order([last, first]) == [first, last]


def test_a_report_is_drawn_again_from_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="report.json is not there"):
        benchmark.read_report(tmp_path)
    benchmark.finish(report(SPEED), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"report.json", "report.md", "report.html"} <= set(before)
    benchmark.finish(benchmark.read_report(tmp_path), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_command_line_of_a_whole_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    calls: list[str] = []
    monkeypatch.setattr(benchmark, "tasks", lambda: [part("a", calls), part("b", calls, Disagreement("step 3"))])
    monkeypatch.setattr("sys.argv", ["benchmark", "--parts", "a", "--out", str(tmp_path)])
    assert benchmark.main() == 0 and (tmp_path / "report.html").is_file()
    monkeypatch.setattr("sys.argv", ["benchmark", "--out", str(tmp_path / "other"), "--all"])
    assert benchmark.main() == 1 and not (tmp_path / "other/report.json").exists()
    assert "the losses disagree, so nothing is compared: step 3" in capsys.readouterr().err
