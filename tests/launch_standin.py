"""Ranks that need neither torch nor a model: what the launcher does is tested on them.

It launches itself through common.launch: `python tests/launch_standin.py MODE FOLDER [SECONDS or CODE]`.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import launch
from common.errors import EXIT_SIGTERM


def rank(mode: str, folder: Path, value: int) -> int:
    launch._end_with_launcher()
    number = os.environ["RANK"]
    (folder / f"pid_{number}").write_text(str(os.getpid()))
    if mode == "finish":
        return 0
    if mode == "code":
        return _tell(value)
    if mode == "crash" and number == "1":
        raise RuntimeError("rank one is broken")
    if mode == "save":
        return _save_when_asked(folder, number, value)
    (folder / f"ready_{number}").touch()
    time.sleep(300)
    return 0


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
    on = launch.free_port(launch.nodes(os.environ))
    return launch.run([*launch.torchrun(on), __file__, *sys.argv[1:]], on)


if __name__ == "__main__":
    sys.exit(main())
