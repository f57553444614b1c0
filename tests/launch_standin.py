"""Ranks that need neither torch nor a model: what the launcher does is tested on them.

It launches itself through common.launch: `python tests/launch_standin.py MODE FOLDER [SECONDS or CODE]`. HANG_SECONDS in the
environment is train.hang_seconds, FOLDER/out the run's OUT.
"""

import os
import signal
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import EXIT_SIGTERM
from common.launch import elastic, heartbeat, launcher


def rank(mode: str, folder: Path, value: int) -> int:
    launcher._end_with_launcher()
    heartbeat.begin()
    number = os.environ["RANK"]
    (folder / f"pid_{number}").write_text(str(os.getpid()))
    if mode == "finish":
        return 0
    if mode == "elastic":
        return _elastic(folder / os.environ["MASTER_PORT"], int(number))
    if mode == "code":
        return _tell(value)
    if mode == "crash" and number == "1":
        raise RuntimeError("rank one is broken")
    if mode == "steps":
        return _steps(folder, int(number), value)
    if mode == "save":
        return _save_when_asked(folder, number, value)
    (folder / f"ready_{number}").touch()
    time.sleep(300)
    return 0


def _steps(folder: Path, number: int, slow: int) -> int:
    """Steps that each end when all ranks have made them. slow: after the fifth, rank 0 evaluates for so many seconds and more,
    and the run ends; 0: it goes on."""
    world = int(os.environ["WORLD_SIZE"])
    signal.signal(signal.SIGTERM, lambda *_: None)  # it would be saved for, at the end of a step
    for step in range(1, 6 if slow else 10**6):
        heartbeat.beat("data", step)
        time.sleep(0.02)
        heartbeat.wait("sum of the loss")
        _meet(folder, number, world, step)
        (folder / f"ready_{number}").touch()
    if number == 0:
        for _ in range(2 * slow):
            heartbeat.beat("evaluation")
            time.sleep(0.5)
    heartbeat.wait("barrier")
    _meet(folder, number, world, 10**6)
    heartbeat.beat(heartbeat.DONE)
    return 0


def _elastic(folder: Path, number: int) -> int:
    """Steps until a rank gets SIGTERM; all then end at the same one, as after a save. folder: of this round."""
    folder.mkdir(exist_ok=True)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    (folder / f"pid_{number}").write_text(str(os.getpid()))
    for step in range(1, 10**6):
        heartbeat.beat("data", step)
        time.sleep(0.02)
        if asked and not (folder / "last").exists():
            (folder / "last.tmp").write_text(str(step + 2))
            (folder / "last.tmp").rename(folder / "last")
        heartbeat.wait("sum of the loss")
        _meet(folder, number, int(os.environ["WORLD_SIZE"]), step)
        (folder / f"ready_{number}").touch()
        if (folder / "last").exists() and step >= int((folder / "last").read_text()):
            break
    return _tell(EXIT_SIGTERM)


def _meet(folder: Path, number: int, world: int, step: int) -> None:
    """A collective: wait until all ranks are there; as gloo does, raise if one has gone."""
    (folder / f"at_{number}.tmp").write_text(str(step))
    (folder / f"at_{number}.tmp").rename(folder / f"at_{number}")
    for other in range(world):
        place, process = folder / f"at_{other}", folder / f"pid_{other}"
        while not place.exists() or int(place.read_text()) < step:
            if process.exists() and not psutil.pid_exists(int(process.read_text() or os.getpid())):
                raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer")
            time.sleep(0.01)


def _save_when_asked(folder: Path, number: str, seconds: int) -> int:
    if (folder / "saved").exists():  # started again: done
        return 0
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    (folder / f"ready_{number}").touch()
    while not asked:
        time.sleep(0.05)
    if number == "0":
        time.sleep(seconds)
        (folder / "saved").touch()
    while not (folder / "saved").exists():  # as the ranks' barrier after a save
        time.sleep(0.05)
    return _tell(EXIT_SIGTERM)


def _tell(code: int) -> int:
    try:
        with open(os.environ["TWINSTACK_EXIT_CODE"], "x", encoding="utf-8") as file:
            file.write(str(code))
    except FileExistsError:
        pass
    return code


def main() -> int:
    mode, folder, *value = sys.argv[1:]
    if "RANK" in os.environ:
        return rank(mode, Path(folder), int(*value or [0]))
    on = launcher.free_port(launcher.nodes(os.environ))
    out, limit = Path(folder) / "out", int(os.environ.get("HANG_SECONDS", "0"))
    variables = {}
    if on.is_elastic:
        worlds = map(int, os.environ["WORLDS"].split(",")) if "WORLDS" in os.environ else on.possible_worlds
        on = on._replace(worlds=tuple(worlds))
        variables = elastic.variables(launcher.settings_of(on, out))
    return launcher.run_ranks([*launcher.torchrun(on), __file__, *sys.argv[1:]], on, out, limit, variables)


if __name__ == "__main__":
    sys.exit(main())
