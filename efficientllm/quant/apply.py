"""Quantization of a parameter tree: the choice of a form for each leaf, and the map that applies it."""

import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from efficientllm.errors import FieldError, UserError
from efficientllm.quant.base import Form, Rows, rounds
from efficientllm.registry import build
from efficientllm.typing import Params, PyTree
from efficientllm.untrusted import patterns
from efficientllm.weights import Weight, box, is_box, path_of

TABLE = re.compile(r"(^|/)(embedding|head/kernel)$")
# QLoRA's rules (arXiv:2305.14314, Section 3): no embedding, no head. Nor a vision tower, whose widths have no groups.
UNROUNDED = ((TABLE.pattern, "float32"), ("^vision/", "float32"))
KERNEL = re.compile(r"^(?!.*\brouter/).*(^|/)kernel$")

Rules = Sequence[tuple[str, str]]  # (regex over parameter paths, spec) pairs, of which the first match counts


def quantize(
    params: Params, spec: str, rules: Rules = (), learn: Callable[[str, Form], PyTree] | None = None
) -> Params:
    """Quantize every kernel to the form `spec`, and embeddings and the head to that form's `embedding`.

    Routers, norms, biases and every parameter that no matrix product reads stay as they are. Trees may be boxed, which
    keeps the axes; abstract, under `jax.eval_shape`; and of stacked or unrolled layers.

    Args:
      rules: override the form of kernels and of the embedding; `"float32"` leaves an array as it is.
      learn: makes the leaf of a path in a calibrated form; `calibrate.quantize` passes it.

    Raises UserError for a spec or rule that names no form, and for a calibrated form without `learn`.
    """
    choose = chooser(spec, rules)

    def quantize_leaf(keys, kernel):
        path = path_of(keys)
        form = choose(path)
        if not rounds(form) or isinstance(kernel, Weight):
            return kernel
        if form.calibrated:
            if learn is None:
                raise FieldError("quant", "is calibrated: give it text to calibrate on", spec)
            quantized = learn(path, form)
        else:
            quantized = leaf(form, path == "embedding", kernel.unbox() if is_box(kernel) else kernel)
        check_finite(quantized, path, spec)
        return box(quantized, kernel.names) if is_box(kernel) else quantized

    return jax.tree_util.tree_map_with_path(
        quantize_leaf, params, is_leaf=lambda leaf: is_box(leaf) or isinstance(leaf, Weight)
    )


def rounder(spec: str, rules: Rules = ()) -> Callable[[str, jax.Array], PyTree]:
    """Make a function of a path and an array that quantizes one parameter, as `quantize` does a whole tree.

    Parameters that are loaded one by one then need memory for one unquantized array at a time.
    """
    choose = chooser(spec, rules)

    def quantize_array(path, array):
        form = choose(path)
        if not rounds(form):
            return array
        quantized = leaf(form, path == "embedding", array)
        check_finite(quantized, path, spec)
        return quantized

    return quantize_array


def check_finite(quantized: PyTree, path: str, spec: str) -> None:
    """Raise UserError for a leaf with infinities or NaN: its weights had them, or are too large for the form."""
    arrays = [array for array in jax.tree.leaves(quantized) if jnp.issubdtype(array.dtype, jnp.floating)]
    if any(isinstance(array, jax.core.Tracer) or not hasattr(array, "addressable_shards") for array in arrays):
        return  # abstract
    if not all(bool(_all_finite(array)) for array in arrays):
        raise FieldError(
            "quant",
            f"{path} has weights that are inf or NaN, or larger than this form can hold; take 'float32', or 'bfloat16' "
            "for what is only large",
            spec,
        )


@jax.jit
def _all_finite(array):
    return jnp.all(jnp.isfinite(array))


def abstract(params: Params, spec: str, rules: Rules = ()) -> Params:
    """Compute the shapes of `quantize`'s result.

    Calibrated forms have the shapes of rounding to nearest; AWQ's have also `x_scale`.
    """

    def quantize_uncalibrated(params):
        arrays = {path_of(keys): array for keys, array in jax.tree_util.tree_flatten_with_path(params)[0]}

        def learn(path, form):
            rounded = leaf(dataclasses.replace(form, method="rtn"), path == "embedding", arrays[path])
            if form.method != "awq":
                return rounded
            *stack, inputs, _ = arrays[path].shape
            return rounded.replace(x_scale=jnp.ones((*stack, 1, inputs), jnp.float16))

        return quantize(params, spec, rules, learn)

    return jax.eval_shape(quantize_uncalibrated, params)


def form_of(spec: str, where: str = "quant") -> Form:
    """Build the form that a spec names. Raises UserError, `where = SPEC: ...`, for a spec that names none."""
    return build("quant", spec, where=where)


def chooser(spec: str, rules: Rules, where: str = "rules") -> Callable[[str], Form | None]:
    """Make a function from a parameter's path to its form, or to None.

    Raises UserError as `quantize` does; `where` is the key of the rules.
    """
    form = form_of(spec)
    try:
        compiled: list[tuple[typing.Any, Form]] = [
            (patterns.compile(pattern, where), form_of(value, where)) for pattern, value in rules
        ]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} = {rules!r} must be pairs of (regex, spec): {error}") from None
    compiled += [(TABLE, form_of(form.embedding)), (KERNEL, form)]  # type: ignore[attr-defined]

    def choose(path):
        return next((value for pattern, value in compiled if is_weight(path) and pattern.search(path)), None)

    return choose


def is_weight(path: str) -> bool:
    """Whether a parameter may have a form: it is a table, or a kernel of a matrix product."""
    return bool(TABLE.search(path) or KERNEL.search(path))


@functools.partial(jax.jit, static_argnums=(0, 1))
def leaf(form: Form, is_table: bool, array: jax.Array) -> Rows:
    """Quantize a kernel `[..., in, out]` or a table `[rows, width]` to a leaf."""
    return form.leaf(array if is_table else jnp.swapaxes(array, -1, -2), is_table)
