"""What a run shows on the screen: its lines, their width, their cost, and colour on a terminal only."""

import io
import json
import os
import pty
import re
import select
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, launch_script, losses

from common import screen
from common.launch import launcher, startup
from common.training import log, trackers
from scripts import compare

LARGE = dict(loss=10.8262, grad_norm=123.4567, lr=6e-4, seconds=987.654, rate=3.517e5, memory=int(139.8 * 2**30), left=8.6e5)


@pytest.mark.parametrize("total", [20, 600_000, 9_999_999])
@pytest.mark.parametrize(("has_mfu", "speed"), [(True, 0.4567), (False, 438.123), (False, 0.000123)])
def test_the_line_of_a_step_fits_and_cuts_no_digit(total: int, has_mfu: bool, speed: float) -> None:
    row = log.Row(total, has_mfu)
    lines = [row.heading(), row.line(total, speed=speed, **LARGE), row.line(1, 2.3e-5, 3.3e-4, 1e-9, 2e-3, 9.0, speed, 0, 5.0)]
    assert all(len(line) <= screen.WIDTH for line in lines), lines
    assert len({len(line) for line in lines}) == 1  # aligned
    number, share, loss, norm, lr, ms, tokens, _, memory, left = lines[1].removeprefix("step").split()
    assert (number, share, loss, norm, lr) == (str(total), "100%", "10.8262", "123.457", "6.00e-04")
    assert (ms, tokens, memory, left) == ("987654", "351.7k", "139.8", "9d22h")
    assert lines[2].split()[3:5] == ["2.3e-05", "3.3e-04"]


def test_a_value_that_is_too_wide_moves_the_others_and_is_whole() -> None:
    line = log.Row(10, False).line(1, 1234567.0, 9876543.0, 1e-3, 1234.5, 1.0, 1234.0, 2**50, 1.0)
    assert {"1234567", "9876543", "1234500", "1.23e+03", "1048576.0"} <= set(line.split()), line


def test_many_parts_of_a_validation_are_wrapped() -> None:
    parts = [f"a_rather_long_name_{i} {i}.0000" for i in range(6)]
    text = log.Row(100, False).valid(10, 1.5, parts)
    assert all(len(line) <= screen.WIDTH for line in text.splitlines()) and all(part in text for part in parts)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "env", "expected"), [
    (Terminal(), {}, True), (io.StringIO(), {}, False),
    (Terminal(), {"NO_COLOR": "1"}, False), (Terminal(), {"TERM": "dumb"}, False),
])  # fmt: skip
def test_colour_is_for_a_terminal_that_wants_it(
    stream: Any, env: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert (screen.styled("a", "red", stream) != "a") is expected


def a_log(out: Path, every: int, steps: int) -> log.Log:
    """The log of rank 0 of a run that is not there."""
    train = SimpleNamespace(log_every=every, steps=steps)
    run = SimpleNamespace(out=out, cfg=SimpleNamespace(train=train), tokens_per_step=512, layout=SimpleNamespace(world=2))
    one = log.Log.__new__(log.Log)
    one.run, one.first, one.device, one.gpu = run, True, SimpleNamespace(type="cpu"), None
    one.first_step = one.current = one.lines = one.steps = one.tokens = 0
    one.seconds, one.start, one.flops_per_token, one.every = 0.0, time.perf_counter(), 1e6, every
    one.row = log.Row(steps, False)
    out.mkdir(exist_ok=True)
    one.file, one.trackers = log._open_metrics(out / "metrics.jsonl", 0), [trackers.TensorBoard(out / "tensorboard", 0, {})]
    return one


def write_steps(one: log.Log, steps: int) -> float:
    """Log these steps; the median seconds of one."""
    times = []
    for step in range(1, steps + 1):
        one.begin_step()
        begin = time.perf_counter()
        one.step(step, 2.5, 0.5, 1e-3, 512)
        times.append(time.perf_counter() - begin)
    one.close()
    return statistics.median(times)


def test_log_every_100_prints_a_hundredth_of_the_lines_and_keeps_every_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_steps(a_log(tmp_path, 100, 1000), 1000)
    printed = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1]) for line in printed if line.startswith("step ")] == list(range(100, 1001, 100))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == list(range(1, 1001))


def test_a_step_costs_less_than_a_tenth_of_a_millisecond(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_steps(a_log(tmp_path, 1, 2000), 2000) < 1e-4


def seen(command: list[Any], seconds: float, **env: str) -> tuple[int, float, str]:
    """Run a command on a terminal of its own: its exit code, the seconds until its first character, and all that it showed."""
    own, other = pty.openpty()
    begin = time.monotonic()
    process = subprocess.Popen(
        [*map(str, command)], stdin=other, stdout=other, stderr=other, cwd=ROOT, env=os.environ | {"TERM": "xterm"} | env
    )
    os.close(other)
    shown, first = b"", 0.0
    while time.monotonic() - begin < seconds and select.select([own], [], [], seconds)[0]:
        try:
            shown += os.read(own, 65536)
        except OSError:  # all have closed it
            break
        first = first or time.monotonic() - begin
    os.close(own)
    return process.wait(), first, shown.decode().replace("\r\n", "\n")


def test_a_run_on_a_terminal(settings: list[str], tmp_path: Path) -> None:
    """Header at once, the parts of the start with seconds, steps, done and what to type next; again: that it is finished."""
    command = ["bash", launch_script("baseline"), ROOT / "recipes/gpt/configs/tiny.yaml", tmp_path / "run", *settings]
    command += ["train.steps=6", "train.log_every=3"]
    env = {"NPROC": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    code, first, shown = seen(command, 120, **env, NO_COLOR="")
    assert code == 0, shown
    print(f"first line after {first:.2f} s")
    assert "\033[2m" in shown  # colour
    plain = re.sub(r"\033\[[0-9;?]*[A-Za-z]", "", shown)
    names = [line.split()[0] for line in plain.splitlines() if line[:1].strip()]
    assert names[:2] == ["model", "data"] and plain.count("\nstart ") == 5 and "first step, loss" in plain, plain
    assert [line.split()[1] for line in plain.splitlines() if line.startswith("step  ")][-2:] == ["3", "6"], plain
    assert "done      6 steps, loss " in plain and f"next      python -m scripts.generate {tmp_path}/run/hf" in plain
    assert sorted(losses(tmp_path / "run")) == list(range(1, 7))
    code, _, shown = seen([*command, "train.log_every=2"], 60, **env, NO_COLOR="1")
    assert code == 0 and shown.startswith(f"complete: {tmp_path}/run is at its last step, 6") and "\033" not in shown


def test_another_node_says_where_to_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launcher._announce(SimpleNamespace(out=tmp_path), launcher.Nodes(8, 2, 1, "node0", 29500))
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("node 1 8 processes of the run; node 0 (node0) prints its progress") and str(tmp_path) in text


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_a_run_whose_reader_ends_stops_with_its_state_saved(both: bool, settings: list[str], tmp_path: Path) -> None:
    """`pretrain.sh ... | head`"""
    out = tmp_path / "run"
    command = ["bash", "recipes/gpt/baseline/pretrain.sh", "recipes/gpt/configs/tiny.yaml", str(out), *settings,
               "train.steps=100000"]  # fmt: skip
    stderr = subprocess.STDOUT if both else subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"NPROC": "1"}, stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as run:
        assert run.stdout is not None
        next(line for line in run.stdout if line.startswith("step    3"))
        run.stdout.close()
        said = "" if both else run.stderr.read()  # type: ignore[union-attr]
        assert run.wait(60) == 143, said
    [saved] = out.glob("step_*")
    steps = sorted(losses(out))
    assert steps == list(range(1, len(steps) + 1)) and saved.name == f"step_{len(steps)}"
    if not both:
        assert said.splitlines() == [
            "note: nothing reads the output any more (`| head` ends after its lines), so this run stops",
            f"stopped after step {len(steps)}, state saved; the same command continues",
        ]


ROWS = [
    ["baseline", "baseline, 2 processes", "400", "-", "4.78980", "4.78980", "18.6k", "1.00", "0.85"],
    ["megatron", "megatron tp=2 sp dist-opt, 2 processes", "600,000", "2.4e-04 at step 399,123", "4.78981", "4.78982",
     "351.7k", "18.91", "139.85"],
]  # fmt: skip


def test_a_long_error_goes_on_between_two_words_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "recipes/" + "x" * 100
    text = f"error: config.yaml: {'a few words, ' * 12}{path}"
    assert screen.error_line(text) == text
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    lines = screen.error_line(text).splitlines()
    assert " ".join(line.strip() for line in lines) == text and all(line.startswith("  ") for line in lines[1:])
    assert len(lines) > 2 and all(len(line) <= 80 or line == f"  {path}" for line in lines)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm")
    assert screen.error_line(text).startswith("\x1b[31merror:\x1b[0m config")


@pytest.mark.parametrize("columns", [200, 160, 80, 60, 20])
def test_a_table_fits_and_cuts_nothing(columns: int) -> None:
    text = screen.table(compare.ON_SCREEN, ROWS, {0, 1, 3}, columns)
    assert max(map(len, text.splitlines())) <= max(columns, 60)  # where there is room for its longest piece
    words = text.split()
    for row in ROWS:
        assert all(word in words for cell in row for word in cell.split()), text
    if columns >= 80:  # right-aligned numbers: each column ends where its heading's does
        first, last = (line for line in text.splitlines() if "4.78980" in line or "4.78981" in line)
        assert [m.end() for m in re.finditer(r"4\.7898\d", first)] == [m.end() for m in re.finditer(r"4\.7898\d", last)]


def test_a_number_of_processes_that_all_runs_have_is_said_once() -> None:
    notes = ["2 cores"]
    cells = compare.on_screen([[*row[:-1], f"{row[-1]} GiB"] for row in ROWS], notes)
    assert [row[1] for row in cells] == ["baseline", "megatron tp=2 sp dist-opt"] and notes == ["2 processes each.", "2 cores"]
    assert [row[-1] for row in cells] == ["0.85", "139.85"] and [row[2:8] for row in cells] == [row[2:8] for row in ROWS]
    for other in ("baseline, 1 process", "baseline"):  # an imported checkpoint has no layout
        notes, rows = [], [[*ROWS[0][:1], other, *ROWS[0][2:]], ROWS[1]]
        assert [row[1] for row in compare.on_screen(rows, notes)] == [other, ROWS[1][1]] and not notes


def test_nothing_is_said_of_the_start_without_a_launcher(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv(startup.LAUNCHED, raising=False)
    startup.begin()
    startup.done("first batch")
    assert capsys.readouterr().out == ""


def test_progress_is_lines_in_a_file_and_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "EVERY", 0)
    with screen.progress("saving", 4, "parameters") as report:
        report(2)
    assert re.fullmatch(r"saving    2 of 4 parameters, \d+s left\n", capsys.readouterr().out)
    with screen.progress("saving", 4, "parameters", shown=False) as report:
        report(2)
    assert capsys.readouterr().out == ""
    code = "from common import screen\nwith screen.progress('saving', 4, 'parameters') as f: f(2)"
    _, _, shown = seen([sys.executable, "-c", code], 30, NO_COLOR="")
    assert "2/4" in shown and shown.rstrip("\n").endswith(("\033[2K", "\033[?25h")), shown
