"""Ease of use, counted on this repository: lines, keys, refusals, silent traps, packages, and what ten mistakes print.

Everything but the mistakes is counted from files, without the stacks, and is the same on any machine with these versions.
"""

import ast
import difflib
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

from common import config, families
from common.comparison import mistakes, refusals
from common.comparison.figures import Figure, Kind, Options, Picture, Task, Value
from common.comparison.traps import TRAPS
from common.paths import ROOT
from common.stacks import extra

SECTION = "Ease of use"
SCRIPTS = ("pretrain.py", "finetune.py")
STACK_CODE = ROOT / "common/stacks"
FAMILY = "gpt"  # has all layouts of both stacks
OWN_RECIPE = ROOT / "docs/own_recipe.md"
DISTRIBUTIONS = {"baseline": ("accelerate", "transformers"), "deepspeed": ("deepspeed",), "megatron": ("megatron-core",)}


def run(options: Options, folder: Path) -> list[Figure]:
    counted = [
        *recipe_lines(options.stacks), *shared_lines(options.stacks), *keys(options.stacks),
        *architecture_change(options.stacks), *layouts(options.stacks), *refused(options.stacks), *traps(options.stacks),
        *packages(options.stacks),
    ]  # fmt: skip
    return [*counted, *mistakes.figures(options.stacks, folder)]


def _figure(table: str, subject: str, metric: str, value: Value, unit: str = "", kind: Kind = "counted") -> Figure:
    return Figure(f"{SECTION} / {table}", subject, metric, value, unit, kind, "python -m scripts.benchmark --parts ease_of_use")


# ---- lines


def code_lines(text: str) -> list[str]:
    """The lines of a Python file that hold code: without blanks, comments and docstrings, and without the ends of others."""
    without = [""] * (text.count("\n") + 2)
    docstrings = _docstring_lines(text)
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.start[1]
    for number, line in enumerate(text.splitlines(), 1):
        if number not in docstrings:
            without[number] = line[: comments.get(number)].rstrip()
    return [line for line in without if line]


def _docstring_lines(text: str) -> set[int]:
    """The numbers of the lines of all docstrings."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            first = node.body[0]
            found |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return found


def difference(before: list[str], after: list[str]) -> tuple[int, int]:
    """(lines that were added, lines that were removed)"""
    changes = [change for change in difflib.SequenceMatcher(None, before, after, False).get_opcodes() if change[0] != "equal"]
    return sum(end - begin for *_, begin, end in changes), sum(end - begin for _, begin, end, *_ in changes)


def _code(path: Path) -> list[str]:
    return code_lines(path.read_text(encoding="utf-8"))


def recipe_lines(stacks: Iterable[str]) -> Iterator[Figure]:
    """What a stack's scripts differ in from the plain loop of the baseline, and the modules that it needs beside them."""
    for family in families.names():
        plain = families.RECIPES / family / "baseline"
        for stack in (s for s in families.stacks(family) if s in stacks):
            folder, table, subject = families.RECIPES / family / stack, "Lines of a recipe", f"{family} {stack}"
            for name in (name for name in SCRIPTS if (folder / name).is_file()):
                short, lines = name.removesuffix(".py"), _code(folder / name)
                yield _figure(table, subject, short, len(lines), "lines")
                if stack != "baseline" and (plain / name).is_file():
                    added, removed = difference(_code(plain / name), lines)
                    yield _figure(table, subject, f"{short} added", added, "lines")
                    yield _figure(table, subject, f"{short} removed", removed, "lines")
            own = [path for path in sorted(folder.glob("*.py")) if path.name not in SCRIPTS]
            yield _figure(table, subject, "own modules", len(own), "files")
            yield _figure(table, subject, "lines in them", sum(len(_code(path)) for path in own), "lines")


def stack_modules(stack: str) -> set[Path]:
    """The modules of common/stacks that a stack's recipes import, directly or from one another."""
    found: set[Path] = set()
    waiting = [path for family in families.names() for path in (families.RECIPES / family / stack).glob("*.py")]
    while waiting:
        new = {STACK_CODE / f"{name}.py" for name in _imported(waiting.pop())} - found
        new = {path for path in new if path.is_file()}
        found |= new
        waiting += new
    return found


def _imported(path: Path) -> set[str]:
    """The names of the modules of common.stacks that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "common.stacks":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("common.stacks."):
            names.add((node.module or "").split(".")[2])
    return names


def shared_lines(stacks: Iterable[str]) -> Iterator[Figure]:
    """The code in common/stacks that the families share."""
    of = {stack: stack_modules(stack) for stack in config.STACKS}
    for stack in stacks:
        elsewhere = set(chain.from_iterable(modules for other, modules in of.items() if other != stack))
        for metric, modules in (("for it alone", of[stack] - elsewhere), ("with others", of[stack] & elsewhere)):
            yield _figure("Lines for all families", stack, metric, sum(len(_code(path)) for path in modules), "lines")


# ---- keys


def keys(stacks: Iterable[str]) -> Iterator[Figure]:
    """The keys of a stack's section in a config, and those of the stack's own configuration that `extra` takes."""
    sections = config.sections(config.Config)
    for stack in stacks:
        yield _figure("Config keys", stack, "keys", len(sections[stack].model_fields), "keys")
        yield _figure("Config keys", stack, "of extra", len(extra.KEYS.get(stack, {})), "keys")


# ---- a change of architecture


def changed_lines(document: str, heading: str) -> dict[str, tuple[int, int]]:
    """{file: (lines added, lines removed)} of the first diff behind a heading that begins with this word."""
    _, _, behind = document.partition(f"\n## {heading}")
    found = re.search(r"^```diff\n(.*?)^```", behind, re.M | re.S)
    if found is None:
        raise ValueError(f"no diff behind the heading {heading}")
    counts: dict[str, tuple[int, int]] = {}
    path = ""
    for line in found[1].splitlines():
        if line.startswith("--- "):
            continue
        if line.startswith("+++ "):
            path = line.removeprefix("+++ b/")
            counts[path] = (0, 0)
        elif line[:1] in "+-" and line:
            added, removed = counts[path]
            counts[path] = (added + (line[0] == "+"), removed + (line[0] == "-"))
    return counts


def architecture_change(stacks: Iterable[str]) -> Iterator[Figure]:
    """The norms of queries and keys of docs/own_recipe.md, by whose files they change."""
    changes = changed_lines(OWN_RECIPE.read_text(encoding="utf-8"), "Architecture")
    for subject in ("for all stacks", *stacks):
        of = [counts for path, counts in changes.items() if _stack_of(path) == subject]
        yield _figure("Change of architecture", subject, "files", len(of), "files")
        yield _figure("Change of architecture", subject, "added", sum(added for added, _ in of), "lines")
        yield _figure("Change of architecture", subject, "removed", sum(removed for _, removed in of), "lines")


def _stack_of(path: str) -> str:
    """recipes/mine/megatron/model.py -> megatron; recipes/mine/task.py -> for all stacks"""
    folder = path.split("/")[2]
    return folder if folder in config.STACKS else "for all stacks"


# ---- layouts


def layouts(stacks: Iterable[str]) -> Iterator[Figure]:
    """The fewest keys, beside the micro batch, that switch a layout on, of those that the checks accept for FAMILY."""
    for stack in stacks:
        best: dict[str, refusals.Keys] = {}
        cfg = refusals.start(FAMILY)
        for keys in refusals.layouts(stack):  # the smallest first
            if keys.get("sequence_parallel") and keys.get("tp", 1) == 1:
                continue  # is accepted, and does nothing
            new = {_choice(stack, key, value) for key, value in keys.items() if key != "micro_batch"} - best.keys()
            if new and not refusals.problems(cfg, stack, keys):
                best |= dict.fromkeys(new, keys)
        for name, keys in sorted(best.items()):
            written = " ".join(f"{key}={config.written(value)}" for key, value in keys.items())
            yield _figure("Keys of a layout", name, "keys", len(keys), "keys")
            yield _figure("Keys of a layout", name, "written", written)


def _choice(stack: str, key: str, value: object) -> str:
    """'megatron tp', 'deepspeed zero_stage=3': one choice, whatever the number of ranks or the list of stages."""
    is_named = isinstance(value, str) and value.isidentifier() or key == "zero_stage"
    return f"{stack} {key}={value}" if is_named else f"{stack} {key}"


# ---- refusals and traps


def refused(stacks: Iterable[str]) -> Iterator[Figure]:
    for family in families.names():
        for stack in (s for s in families.stacks(family) if s in stacks):
            walk = refusals.walk(family, stack)
            subject = f"{family} {stack}"
            yield _figure("Refusals", subject, "tried", walk.tried, "layouts")
            yield _figure("Refusals", subject, "accepted", walk.accepted, "layouts")
            yield _figure("Refusals", subject, "reasons", len(walk.reasons), "rules")


def traps(stacks: Iterable[str]) -> Iterator[Figure]:
    """What a stack does in silence, one line each with a test that holds it."""
    for owner in (*stacks, "libraries"):
        yield _figure("Silent traps by stack", owner, "traps", sum(trap.owner == owner for trap in TRAPS), "traps")
    for trap in (trap for trap in TRAPS if trap.owner in (*stacks, "libraries")):
        yield _figure("Silent traps", trap.name, "of", trap.owner)
        yield _figure("Silent traps", trap.name, "in silence", trap.silent)
        yield _figure("Silent traps", trap.name, "held by", trap.test)


# ---- packages


def packages(stacks: Iterable[str]) -> Iterator[Figure]:
    """The distributions that a stack needs beyond the plain loop's, and their installed size by their RECORD."""
    plain = closure(DISTRIBUTIONS["baseline"])
    for stack in stacks:
        names = plain if stack == "baseline" else closure(DISTRIBUTIONS[stack]) - plain
        size = sum(map(installed_bytes, names))
        subject = "baseline" if stack == "baseline" else f"{stack}, beyond it"
        yield _figure("Packages", subject, "packages", len(names), "packages")
        yield _figure("Packages", subject, "size", round(size / 1e6, 1), "MB")


def closure(roots: Iterable[str]) -> set[str]:
    """The installed distributions that these need, themselves included, by their normalized names."""
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(name) for name in roots]
    while waiting:
        one = waiting.pop()
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        for extra_name in ("", *one.extras):
            if (name, extra_name) in found or not _is_installed(name):
                continue
            found.add((name, extra_name))
            needed = map(Requirement, metadata.requires(name) or ())
            waiting += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": extra_name})]
    return {name for name, _ in found}


@cache
def _is_installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


@cache
def installed_bytes(name: str) -> int:
    """The files that a wheel brought; compiled .pyc have no size in RECORD and are not counted."""
    return sum(file.size or 0 for file in metadata.files(name) or ())


TASKS: tuple[Task, ...] = (Task("ease_of_use", SECTION, 45, run),)
PICTURES: tuple[Picture, ...] = (
    Picture(
        "ease_mistakes", SECTION, "Lines to read after each of ten mistakes",
        "a small GPT in 2 processes, measured on {hardware}",
        "Lines that a user reads after each of ten mistakes, with these recipes and without them.",
        mistakes.draw,
    ),
)  # fmt: skip
