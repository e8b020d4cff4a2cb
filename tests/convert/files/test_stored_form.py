"""Names of the quantized form of a checkpoint's weights."""

import types

import pytest

from efficientllm.convert.files.stored_form import history, stored_form


def source(config=None, **forms):
    shapes = {name: (size, 1) if size > 1 else (64,) for name, (_, size) in forms.items()}
    tensors = types.SimpleNamespace(shapes=shapes, form=lambda name: forms[name][0])
    return types.SimpleNamespace(config=config or {}, tensors=tensors)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (source(embedding=("Q6_K", 10), mlp=("Q4_1", 90), norm=("F32", 1)), "Q4_1"),
        (source(embedding=("F16", 900), mlp=("Q4_0", 90)), "Q4_0"),
        (source(embedding=("BF16", 10), mlp=("F16", 90)), None),
        (source({"quantization_config": {"quant_method": "awq"}}), "awq"),
        (types.SimpleNamespace(config={}, tensors=None), None),
    ],
)
def test_the_form_of_most_rounded_weights(dtypes, expected):
    assert stored_form(dtypes) == expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("float32", "dequantised from Q4_1"),
        ("bfloat16", "dequantised from Q4_1"),
        ("int4(group=64)", "rounded twice: Q4_1 in the file, then int4(group=64)"),
        ("nf4()", "rounded twice: Q4_1 in the file, then nf4()"),
        ("stored", "as the file holds them, Q4_1"),
    ],
)
def test_what_weights_went_through(spec, expected):
    assert history(source(mlp=("Q4_1", 90)), spec) == expected
    assert history(source(mlp=("F16", 90)), spec) == history(None, spec) == ""
