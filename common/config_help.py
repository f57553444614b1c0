"""What each key of a config is for, from the schema itself: `pretrain.sh --help-config` and docs/configs.md."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from common.config import Config, Section, sections
from common.errors import BadInput

WIDTH = 80  # columns of --help-config
LIMITS = (2**31, 2**63)  # upper bounds that no user meets


class Row(NamedTuple):
    """One key."""

    key: str  # section.key
    values: str  # what it takes
    default: str  # as one writes it; 'required'; '' where the description says what is taken
    may_change: str  # 'resume', 'phases'
    description: str


def rows(name: str, section: type[Section], own: bool = False, may_change: str | None = None) -> Iterator[Row]:
    """The keys of a section, those of the sections in it included. own: those alone that this class itself declares.
    may_change: of a section in another, what its key there has."""
    schema = section.model_json_schema(by_alias=True)
    required = schema.get("required", ())
    for field_name, field in section.model_fields.items():
        if own and field_name not in section.__annotations__:
            continue
        key = field.alias or field_name
        changes = [word for word, keys in (("resume", section.resume_keys()), ("phases", section.phase_keys())) if key in keys]
        may = ", ".join(changes) if may_change is None else may_change
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from rows(f"{name}.{key}", field.annotation, may_change=may)
            continue
        values = schema["properties"][key]
        default = "required" if key in required else "" if field.default is None else _written(values.get("default"))
        yield Row(f"{name}.{key}", _values(values), default, may, field.description or "")


def _written(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _values(schema: dict[str, Any]) -> str:
    """What a key takes, in words, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(_values(kind) for kind in schema["anyOf"] if kind.get("type") != "null")
    if "format" in schema:
        return str(schema["format"])
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return kind + _bounds(schema)
    if kind == "array":
        count = f"{schema['minItems']} " if schema.get("minItems") == schema.get("maxItems", -1) else ""
        return f"list of {count}{_values(schema.get('items', {}))}s"
    return {"boolean": "true | false", "string": "text", "object": "{key: value}"}.get(str(kind), "value")


def _bounds(schema: dict[str, Any]) -> str:
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    most, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if schema["type"] == "integer":
        least, above = above + 1 if above is not None else least, None
        most, below = below - 1 if below is not None and below not in LIMITS else most, None
    words = [(" from", least), (" above", above), (" to", most), (" below", below)]
    return "".join(f"{word} {bound}" for word, bound in words if bound is not None)


def of_config(schema: type[Config]) -> dict[str, list[Row]]:
    """{section: its keys}, `phases` and `expect` included, in the order of a config."""
    by_section: dict[str, list[Row]] = {}
    nested = sections(schema)
    for field_name, field in schema.model_fields.items():
        name = field.alias or field_name
        if name in nested:
            by_section[name] = list(rows(name, nested[name]))
        else:
            by_section[name] = [Row(name, "list" if name == "phases" else "{name: score}", "", "", field.description or "")]
    return by_section


def text(schema: type[Config], section: str | None = None) -> str:
    """What --help-config prints. BadInput for a section that the family's config does not have."""
    every = of_config(schema)
    if section is not None and section not in every:
        raise BadInput(f"--help-config {section}: no such section; give one of {', '.join(every)}")
    lines: list[str] = []
    for name, keys in every.items():
        if section in (None, name):
            lines += [*_heading(name, sections(schema).get(name)), *(line for row in keys for line in _lines(row)), ""]
    return "\n".join(lines).rstrip()


def _heading(name: str, section: type[Section] | None) -> list[str]:
    doc = (section.__doc__ or "") if section else ""
    first = " ".join(doc.split("\n\n")[0].split())
    return textwrap.wrap(f"{name}: {first}", WIDTH, subsequent_indent="  ") if first else [name]


def _lines(row: Row) -> list[str]:
    what = f"  {row.key}  ({row.values}; {row.default})" if row.default == "required" else f"  {row.key}  ({row.values})"
    if row.default not in ("", "required"):
        what = f"  {row.key}={row.default}  ({row.values})"
    may = f" May change: on {row.may_change}." if row.may_change == "resume" else ""
    indent = " " * 6
    return [
        *textwrap.wrap(what, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False),
        *textwrap.wrap(row.description + may, WIDTH, initial_indent=indent, subsequent_indent=indent),
    ]


def table(keys: list[Row]) -> str:
    """The same as a table of Markdown."""

    def cell(words: str) -> str:
        return words.replace("|", "\\|")

    lines = ["| key | values | default | may change | meaning |", "|---|---|---|---|---|"]
    lines += [f"| `{row.key}` | " + " | ".join(map(cell, row[1:])) + " |" for row in keys]
    return "\n".join(lines)
