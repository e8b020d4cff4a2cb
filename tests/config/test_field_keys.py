"""FieldErrors of low-level code: which key and value of a config they end up with."""

import ast
import pathlib

import pytest

from efficientllm import base_config
from efficientllm.config.field_keys import name_keys
from efficientllm.config.plain import flatten
from efficientllm.errors import FieldError, UserError

ROOT = pathlib.Path(__file__).parents[2] / "efficientllm"


def message(field, problem, value=None):
    with pytest.raises(UserError) as raised, name_keys(base_config.get_config()):
        raise FieldError(field, problem, value)
    return str(raised.value)


def test_a_field_error_gets_the_key_and_the_value_of_the_config():
    assert message("remat", "no such policy; take full") == "config.model.remat = 'none': no such policy; take full"
    assert message("mesh", "needs 8", "data=-1") == "config.mesh = 'data=-1': needs 8"
    assert message("train.batch_size", "is odd") == "config.train.batch_size = 8: is odd"


def test_the_value_of_another_config_and_an_unknown_field_keep_their_own_words():
    assert message("mesh", "needs 8", "data=8") == "mesh = 'data=8': needs 8"
    assert message("dispatch", "needs rows") == "dispatch: needs rows"
    assert message("batch_size", "is 3") == "batch_size: is 3"  # of train, infer and quality


def test_other_errors_pass():
    with pytest.raises(UserError, match=r"^config\.seed = 1: taken$"), name_keys(base_config.get_config()):
        raise UserError("config.seed = 1: taken")


def test_every_field_that_is_complained_about_is_one_key():
    keys = [f".{key}" for key in flatten(base_config.get_config().to_dict())]
    fields = {
        node.args[0].value
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "FieldError"
    }
    assert {"adapter", "mesh", "quant", "remat"} <= fields
    counts = {field: sum(key.endswith(f".{field}") for key in keys) for field in fields}
    assert counts == dict.fromkeys(fields, 1)
