"""Every key of a config is documented, in its schema alone: --help-config and docs/configs.md say the same."""

import importlib
import re

import pytest
from conftest import ROOT

from common import config, config_help, families
from common.errors import BadInput
from scripts import document_configs

SCHEMAS = {
    f"{family}/{module}": importlib.import_module(f"recipes.{family}.{module}").Config
    for family in families.names()
    for module in ("task", "finetune")
    if (ROOT / f"recipes/{family}/{module}.py").is_file()
}


def test_other_names_are_no_keys_and_mean_one():
    tables = [rows for schema in SCHEMAS.values() for rows in config_help.of_config(schema).values()]
    keys = {row.key.rpartition(".")[2] for rows in tables for row in rows}
    assert set(config.OTHER_NAMES.values()) <= keys
    assert "stage" not in keys and not {"zero", "batch_size", "learning_rate", "micro"} & keys


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_has_a_description(name: str):
    rows = [row for keys in config_help.of_config(SCHEMAS[name]).values() for row in keys]
    assert [row.key for row in rows if not row.description.endswith(".")] == []
    assert [row.key for row in rows if row.values == "value"] == []


def test_the_page_is_that_of_the_schemas():
    """Of the families that it has and that are here: a copied recipe need not be on it."""
    page = document_configs.PAGE.read_text(encoding="utf-8")
    listed = re.findall(r"^## (\w+), pretraining$", page, re.M)
    parts = document_configs.parts([name for name in families.names() if name in listed])
    stale = [title for title, body in parts.items() if "\n\n".join(filter(None, [title, body])) + "\n" not in page]
    assert stale == [], "stale; type: python -m scripts.document_configs"


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_text_fits_a_screen(name: str):
    text = config_help.text(SCHEMAS[name])
    assert max(map(len, text.splitlines())) <= config_help.WIDTH
    for section in config.sections(SCHEMAS[name]):
        assert f"\n{section}" in f"\n{text}"
    assert config_help.text(SCHEMAS[name], "train").startswith("train: ")
    with pytest.raises(BadInput, match="--help-config trian: no such section; give one of model, data, optim, train"):
        config_help.text(SCHEMAS[name], "trian")
