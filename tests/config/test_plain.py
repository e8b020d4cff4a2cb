"""A config as plain data: keys that are new since version 0.1 change nothing where they have their defaults."""

import json

import pytest
from ml_collections import ConfigDict

import runs
from efficientllm import base_config
from efficientllm.config import plain

pytestmark = pytest.mark.quick
STORED = runs.ROOT / "tests/golden/data/run_v0.1"


def test_the_defaults_of_new_keys_are_those_of_the_base_config():
    config = base_config.get_config()
    for group, added in plain.ADDED.items():
        values = config[group] if group else config
        assert {key: values[key] for key in added} == added


def test_the_keys_of_a_run_are_those_of_version_01():
    """A key that was added since is left out at its default: else the runs of every user would be other runs."""
    stored = json.loads((STORED / "config.json").read_text())
    assert plain.flatten(plain.plain(base_config.get_config())).keys() == plain.flatten(stored).keys()


def test_a_config_of_version_01_has_the_hash_that_it_had():
    stored = json.loads((STORED / "config.json").read_text())
    config = ConfigDict(stored)
    before = plain.config_hash(config)
    config.model.unroll = 12
    assert plain.plain(config) == stored and plain.config_hash(config) == before
    config.model.unroll = 0
    assert plain.plain(config)["model"]["unroll"] == 0 and plain.config_hash(config) != before


def test_a_stored_config_gets_its_new_keys_back():
    config = base_config.get_config()
    stored = plain.plain(config)
    assert not {"unroll", "embed"} & stored["model"].keys() and "objective" not in stored
    assert plain.with_added_keys(stored) == json.loads(json.dumps(config.to_dict()))
    stored["model"]["unroll"] = 0
    assert plain.with_added_keys(stored)["model"]["unroll"] == 0
