"""Contract check that every field of a technique is read."""

import functools

import flax.linen as nn
import jax

from contract import LAYERS, SIZE, TYPICAL, B, batch, build, check
from efficientllm import model, registry
from efficientllm.errors import UserError
from efficientllm.ops.attention import Context
from efficientllm.runtime import kernel_choice

# Fields that act on pictures, which the program of a text has not: tests/vision/test_tower_rows.py and
# tests/convert/test_sd3_parity.py look at what they do.
OF_PICTURES = {("image_window", "bin"), ("sincos2d", "table")}


@check(*LAYERS, "position", quick=TYPICAL)
def check_fields(kind, spec):
    """Every field changes the program. A field that is not read is a bug."""
    name, values = registry.parse_spec(spec)
    fields = {key: field.annotation for key, field in registry.spec_parameters(registry.lookup(kind, name)).items()}
    for field, annotation in fields.items():
        if (name, field) in OF_PICTURES:
            continue
        changes = (
            _changes(kind, name, {**values, **context}, field, value)
            for context in _contexts(kind, name, fields, field)
            for value in _alternatives(kind, name, field, annotation)
        )
        assert any(changes), f"{kind} {name}: no value of {field!r} that it takes changes anything"


def _changes(kind, name, values, field, value):
    """Whether the value changes the program. A value that the technique refuses does not count."""
    try:
        return _program(kind, _spec(name, values)) != _program(kind, _spec(name, {**values, field: value}))
    except UserError:
        return False


# Another value for fields whose type does not tell one; "auto" is "xla" at this length.
OTHER_VALUES = {
    "position": "rope(base=7.0)",
    "norm": "rmsnorm(eps=0.1)",
    "precision": "bfloat16",
    "attention_kernel": "chunked",
    "kernel": "ragged_dot",
    "block_kernel": "grouped",
    "scaling": "linear(factor=3.0)",
    "scan_kernel": "associative",
    "rwkv_kernel": "chunked",
    "kv_cache": "int8",
    "qk_norm": "all",
    "sections": (1, 3),
}


def _contexts(kind, name, fields, tried):
    """Settings under which a field may matter: none, then every other switch switched."""
    yield {}
    for other, annotation in fields.items():
        if other != tried and annotation in (bool, str, tuple, bool | str):
            yield {other: True if annotation is bool else _alternatives(kind, name, other, str)[-1]}


def _alternatives(kind, name, field, annotation):
    choices = registry.choices(kind, name)
    if field in choices:
        return choices[field]
    if field in OTHER_VALUES:
        return [OTHER_VALUES[field]]
    others = {bool: [True, False], float: [0.37, 7.0], int: [4, 8, 64]}
    why = f"{kind} {name}: register it with choices={{{field!r}: (...)}}, or give {field!r} a type such as int"
    assert annotation in others, why
    return others[annotation]


def _spec(name, values):
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in values.items())})"


@functools.cache
def _program(kind, spec):
    """The traced model, its kernels, its parameters and its state, as text: what differs differs in what is computed.

    Initialised and run in one trace of one layer: every other way traces a block several times.
    """
    lm = build(kind, spec, size=SIZE.replace("num_layers=2", "num_layers=1"), scan=False)
    packed = batch()
    ctx = Context.packed(packed["positions"], packed["segments"])
    with kernel_choice.recording_kernels() as used:
        traced = jax.make_jaxpr(lambda key: nn.unbox(lm.init_with_output(key, packed["tokens"], ctx)))(
            jax.random.key(0)
        )
    states = jax.eval_shape(lambda: model.init_states(lm, B, 1))
    return str(traced) + str(used) + str(jax.tree.map(lambda leaf: leaf.shape, states))
