"""The YAML of a config: plain values alone, `a.b=c` overrides, and the same values as text again. Knows no schema."""

import difflib
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.errors import BadInput, shortened
from common.paths import ROOT

FILE_BYTES = 2**18  # of a config; the largest here has 3 KB
VALUES = 10_000  # of a config, keys counted too; PyYAML reads as many in half a second
DEPTH = 32  # of sections and lists in each other; the configs here have 4


class _Loader(yaml.SafeLoader):
    """A SafeLoader for plain values, so that a small file stays a small config: no anchors, tags or deep nesting. Numbers are
    those of YAML 1.2 (`010`, `1:30` and dates are strings, `6e-4` is a number). A key must be a string and given once."""

    depth = 0
    values = 0
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = f"aliases (*{event.anchor}) are not read; write the value again"
        elif getattr(event, "anchor", None):
            problem = f"anchors (&{event.anchor}) are not read; write the value where it is used"
        elif getattr(event, "tag", None) not in (None, "!"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            problem = f"tags ({tag}) are not read; write the value alone"
        elif self.depth == DEPTH:
            problem = f"nested more than {DEPTH} deep"
        elif self.values == VALUES:
            problem = f"more than {VALUES:,} values"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        self.values += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):  # `on` is true, `1` a number
                message = f"the key {key_node.value if isinstance(key_node, yaml.ScalarNode) else key!r} must be a string"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            if key in seen:
                message = f"the key {key!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(
    r"^([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
# at most 40 digits: more than any key takes, and few enough for a message
_INT = re.compile(r"^([-+]?(0|[1-9][0-9_]{0,39})|0x[0-9a-fA-F]{1,16})$")
_BOOL = re.compile(r"^(yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$")
_NULL = re.compile(r"^(~|null|Null|NULL|)$")
for _tag, _pattern, _first in (
    ("bool", _BOOL, "yYnNtTfFoO"), ("float", _FLOAT, "-+0123456789."), ("int", _INT, "-+0123456789"), ("null", _NULL, "~nN"),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, [*_first, *([""] if _tag == "null" else [])])


class _Dumper(yaml.SafeDumper):
    """Quotes every string that _Loader or another reader would take for another type, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def to_yaml(values: Any, **style: Any) -> str:
    """The YAML of plain values, with the keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120, **style)


def _parse(text: str) -> Any:
    """The value of a YAML document. ValueError, whose message is one line, if it is not plain YAML."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).replace('in "<unicode string>", ', "at ").split())) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The sections of a config file. BadInput if there is no such file, or if it is not a config."""
    path = Path(path)
    try:
        if not path.is_file():
            raise BadInput(no_such_config(path))
        with open(path, "rb") as file:
            content = file.read(FILE_BYTES + 1)
        if len(content) > FILE_BYTES:
            raise BadInput(f"{path}: has more than {FILE_BYTES >> 10} KB; a config is smaller")
        values = _parse(content.decode("utf-8-sig"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"is a {type(values).__name__}"
        raise BadInput(f"{path}: must have sections (model, data, optim, train), and {what}")
    return values


def no_such_config(path: Path) -> str:
    """The error for a path without a config: it names the one that is meant in the repository, those in the same folder, or
    those of a similar name."""
    if not path.is_absolute() and (ROOT / path).is_file():
        return f"{path}: no such config in {Path.cwd()}; type {ROOT / path}"
    what = "is a folder, not a config" if path.is_dir() else "no such config"
    folder = path if path.is_dir() else path.parent
    configs = sorted(folder.glob("*.yaml")) or sorted((ROOT / folder).glob("*.yaml"))
    if configs:
        close = difflib.get_close_matches(path.name, [p.name for p in configs], 1)
        hint = next((f"; did you mean {p}?" for p in configs if p.name in close), ";")
        return f"{path}: {what}{hint} {folder} has: {', '.join(p.name for p in configs)}"
    configs = sorted(ROOT.glob("recipes/*/configs/*.yaml"))
    close = difflib.get_close_matches(path.name, [p.name for p in configs], 1)
    meant = [str(p) for p in configs if p.name in close]
    hint = f"did you mean {' or '.join(meant)}?" if meant else f"those of a recipe are in {ROOT / 'recipes/FAMILY/configs'}"
    return f"{path}: {what}; {hint}"


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set each `a.b=c` in `values`, where c is YAML; return the problems."""
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        named = f"override {shortened(text)!r}"
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key) or key.count(".") >= DEPTH:
            problems.append(f"{named}: must be section.key=value, for example train.steps=100")
            continue
        *sections, last = key.split(".")
        node = values
        for name in sections:
            child = node.get(name)
            if child is None:
                child = node[name] = {}
            if not isinstance(child, dict):
                problems.append(f"{named}: {shortened(name)} is a value, not a section")
                break
            node = child
        else:
            try:
                node[last] = _parse(value)
            except ValueError as error:
                message = str(error).partition(" at line ")[0]
                if message.startswith(("the key ", "aliases ", "anchors ", "tags ", "nested ", "more than ")):  # of _Loader
                    problems.append(f"{named}: {message}")
                    continue
                value = shortened(value)
                problems.append(f"{named}: {value!r} is not a YAML value; quote it: {shortened(key)}='\"{value}\"'")
    return problems
