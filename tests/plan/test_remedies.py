"""Single changes that are tried where a step does not fit."""

import pytest

from configs import base
from efficientllm.errors import UserError
from efficientllm.plan import remedies


def config(**values):
    config_of_plan = base.get_config()
    config_of_plan.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return config_of_plan


SHAPE = {"data": 8, "fsdp": 1, "expert": 1, "tensor": 2}
ONE = dict.fromkeys(SHAPE, 1)


def test_of_each_kind_the_smallest_change_that_fits():
    tried = []
    meshes = {"data=4, fsdp=2": 110, "data=2, fsdp=4": 90, "fsdp=8": 50}

    def total_of(change):
        tried.append(change)
        ((key, value),) = change.items()
        if key == "mesh":
            return meshes[value.removesuffix(", tensor=2")]
        return 120 if key == "model.remat" else 100 - value

    changes = remedies.attempt(remedies.of_training(config(train__batch_size=32), SHAPE), 100, total_of)
    assert [(remedy.flags, remedy.total_bytes, remedy.fits) for remedy in changes] == [
        ("--config.model.remat=full", 120, False),
        ("--config.mesh='data=2, fsdp=4, tensor=2'", 90, True),
        ("--config.train.accumulate=2", 98, True),
    ]
    assert {"mesh": "fsdp=8, tensor=2"} in tried


def test_what_cannot_be_changed_is_not_tried():
    shape = {"data": 1, "fsdp": 4, "expert": 2, "tensor": 1}
    assert remedies.of_training(config(model__remat="full", train__batch_size=8), shape) == []
    assert remedies.of_serving(config(), []) == []


def test_ways_that_divide_no_width_may_be_fewer():
    shape = {"data": 1, "fsdp": 48, "expert": 1, "tensor": 1}
    changes = remedies.of_training(config(model__remat="full", train__batch_size=48), shape)
    assert changes == [[{"mesh": "data=3, fsdp=16"}]]


def test_a_request_s_weights_may_be_smaller_or_its_rows_fewer():
    changes = remedies.of_serving(config(infer__batch_size=6), ["int8()", "int4()"])
    assert changes == [
        [{"quant": "int8()"}, {"quant": "int4()"}],
        [{"infer.batch_size": 3}, {"infer.batch_size": 2}, {"infer.batch_size": 1}],
    ]


def test_a_change_that_is_refused_says_why():
    def refuse(change):
        raise UserError("no such thing")

    asked = remedies.of_training(config(train__batch_size=1), ONE)
    (refused,) = remedies.attempt(asked, 1, refuse)
    assert not refused.fits and refused.reason == "no such thing"
    (refused,) = remedies.attempt(asked, 1, lambda change: None)
    assert not refused.fits and "does not say" in refused.reason


@pytest.mark.parametrize("fits_from", [1, 2, 3, 4, 9])
def test_halving_finds_the_smallest(fits_from):
    steps = [{"train.accumulate": size} for size in (1, 2, 3)]
    smallest = remedies._smallest(steps, None, 0, lambda change: int(change["train.accumulate"] < fits_from))
    assert (smallest and smallest.change["train.accumulate"]) == (fits_from if fits_from <= 3 else None)
