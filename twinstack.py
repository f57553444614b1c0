"""The command `twinstack`, which `pip install -e .` makes: shorter words for the launch scripts and the commands of scripts/.

Each subcommand becomes the command that it stands for, in the same process: arguments, messages, signals and exit codes are
those of that command. Nothing else of the repository is imported here, so that it starts at once.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
OF_REPOSITORY = ROOT / ".venv/bin/python"
STACKS = ("baseline", "deepspeed", "megatron")
LAUNCH = ("pretrain", "finetune")
COMMANDS = {  # the file in scripts/ of a command, and what it does
    "quickstart.sh": "train one small model on all stacks and compare them",
    "plan.py": "time, memory and days of the layouts of a config, before a run",
    "simulate.py": "run one rank of a config on a GPU that does nothing",
    "state.py": "verify, show or re-cut the checkpoints of a run",
    "evaluate.py": "evaluate a model by published protocols",
    "generate.py": "generate text from a model",
    "heldout.py": "loss of a run's export on held-out text",
    "compare.py": "compare runs: loss curves, speed, memory",
    "plot.py": "draw the loss curves of runs",
    "parity.py": "check that all stacks and layouts train one curve",
    "check.py": "check runs against their published numbers",
    "publish.py": "write the record of a run that check reads",
    "seeds.py": "run one finetuning with several seeds",
    "benchmark.py": "compare the stacks on this machine",
    "gpu_check.sh": "run the checks that need a GPU",
}
USAGE = """\
usage: twinstack COMMAND ...            (twinstack COMMAND --help explains it)

  pretrain FAMILY STACK CONFIG OUT [section.key=value ...] [--dry-run]
  finetune FAMILY STACK CONFIG OUT [section.key=value ...] [--dry-run]
               start or continue a run; the same as
               bash recipes/FAMILY/STACK/pretrain.sh CONFIG OUT ...
  data NAME OUT ...
               make a corpus; the same as python -m data.NAME OUT ...
  convert FAMILY to-hf RUN HF_DIR, or from-hf HF_DIR OUT
               convert to and from Hugging Face folders
{commands}

FAMILY is {families}; STACK is {stacks}."""


class Refused(Exception):
    """Words that are no command: one line that says what to type."""


def main() -> NoReturn:
    """Become the command that the words stand for, or exit: 0 for help, 2 for words that are no command."""
    try:
        command = command_of(sys.argv[1:])
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        sys.exit(2)
    if not command:
        print(usage())
        sys.exit()
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # imports are from the repository, not the current folder
    os.environ |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
    if python() == sys.executable:  # the launch scripts take the first python3 if there is no .venv
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    elif OF_REPOSITORY.parent.parent.resolve() != Path(sys.prefix).resolve():
        print(f"note: running in {ROOT / '.venv'}, as the launch scripts do, not in {sys.prefix}", file=sys.stderr, flush=True)
    os.execvp(command[0], command)


def python() -> str:
    """The Python of a run, chosen as the launch scripts do: that of .venv, else that of this command."""
    return str(OF_REPOSITORY) if os.access(OF_REPOSITORY, os.X_OK) else sys.executable


def command_of(words: list[str]) -> list[str]:
    """The command that the words stand for: bash recipes/gpt/megatron/pretrain.sh CONFIG OUT, for example. Empty if they ask
    for the usage. Refused says which word is wrong."""
    if not (ROOT / "common/launch").is_dir():
        raise Refused(f"{ROOT} has no recipes; install this command where they are: pip install --no-deps -e . in a clone")
    name, *rest = words or ["--help"]
    asks_help = bool({"-h", "--help"} & set(rest[: {"pretrain": 2, "finetune": 2, "convert": 1}.get(name, 0)]))
    if name in ("-h", "--help") or asks_help:
        return []
    if name in LAUNCH:
        family = one_of(rest[:1], "FAMILY", families(), name)
        stacks = [stack for stack in STACKS if (ROOT / "recipes" / family / stack / f"{name}.sh").is_file()]
        stack = one_of(rest[1:2], "STACK", stacks, f"{name} {family}")
        return ["bash", str(ROOT / "recipes" / family / stack / f"{name}.sh"), *rest[2:]]
    if name == "data":
        if rest[:1] in ([], ["-h"], ["--help"]):
            return [python(), "-m", "data"]
        known = sorted(path.stem for path in ROOT.glob("data/*.py") if "__name__ ==" in path.read_text(encoding="utf-8"))
        return [python(), "-m", f"data.{one_of(rest[:1], 'NAME', [k for k in known if k != '__main__'], name)}", *rest[1:]]
    if name == "convert":
        return [python(), "-m", f"recipes.{one_of(rest[:1], 'FAMILY', families(), name)}.convert", *rest[1:]]
    scripts = {file.partition(".")[0]: file for file in COMMANDS}
    file = scripts[one_of([name], "COMMAND", [*LAUNCH, "data", "convert", *scripts], "")]
    path = ROOT / "scripts" / file
    return ["bash", str(path), *rest] if path.suffix == ".sh" else [python(), "-m", f"scripts.{path.stem}", *rest]


def one_of(word: list[str], what: str, allowed: list[str], before: str) -> str:
    """The word, if it is allowed. Refused otherwise, with what is allowed and the nearest of it."""
    if word and word[0] in allowed:
        return word[0]
    if not word:
        raise Refused(f"{what} is missing; type: twinstack {before} {what} ..., where {what} is {' or '.join(allowed)}")
    import difflib

    near = difflib.get_close_matches(word[0], allowed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise Refused(f"{word[0]!a}: no such {what}{hint} {what} is {', '.join(allowed)}")


def families() -> list[str]:
    """As common.families.names, which is not imported: a family is a folder of recipes/ with a task.py."""
    return sorted(path.parent.name for path in ROOT.glob("recipes/*/task.py"))


def usage() -> str:
    commands = "\n".join(f"  {file.partition('.')[0]:<13}{what}" for file, what in COMMANDS.items())
    return USAGE.format(commands=commands, families=", ".join(families()), stacks=", ".join(STACKS))


if __name__ == "__main__":
    main()
