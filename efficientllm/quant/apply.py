"""Quantization of a parameter tree: which leaves are quantized, and in which form."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp

from efficientllm.errors import UserError
from efficientllm.quant.base import rounds
from efficientllm.registry import build
from efficientllm.untrusted import patterns
from efficientllm.weights import Weight, box, is_box, path_of

TABLE = re.compile(r"(^|/)(embedding|head/kernel)$")
KEEP_TABLES = ((TABLE.pattern, "float32"),)  # rules of a tuning: embeddings and the head (arXiv:2305.14314, Section 3)
KERNEL = re.compile(r"^(?!.*\brouter/).*(^|/)kernel$")


def quantize(params, spec, rules=(), learn=None):
    """The parameters with every kernel in the form `spec`, and embeddings and the head in the form it has for them.

    Routers, norms, biases and all that no matrix product reads stay as they are. `rules` are (regex, spec) pairs that
    come first, for what is a kernel or the embedding; `"float32"` leaves it as it is. Works on boxed trees, whose
    arrays stay boxed with their axes, on abstract ones under `jax.eval_shape`, and on stacked or unrolled layers. The
    leaves of calibrated forms are those of `learn(path, form)`, which `calibrate.quantize` gives. Raises UserError for
    a spec or rule that is none, and for a calibrated form without `learn`.
    """
    choose = chooser(spec, rules)

    def quantize_leaf(keys, kernel):
        path = path_of(keys)
        form = choose(path)
        if not rounds(form) or isinstance(kernel, Weight):
            return kernel
        if form.calibrated:
            if learn is None:
                raise UserError(f"quant = {spec!r} is calibrated: give it text to calibrate on")
            quantized = learn(path, form)
        else:
            quantized = leaf(form, path == "embedding", kernel.unbox() if is_box(kernel) else kernel)
        check_finite(quantized, path, spec)
        return box(quantized, kernel.names) if is_box(kernel) else quantized

    return jax.tree_util.tree_map_with_path(
        quantize_leaf, params, is_leaf=lambda leaf: is_box(leaf) or isinstance(leaf, Weight)
    )


def rounder(spec, rules=()):
    """A function of a path and an array that gives its leaf in the form `spec`, as `quantize` does for a whole tree:
    for parameters that come one by one, of which the memory then never holds more than one as it was."""
    choose = chooser(spec, rules)

    def quantize_array(path, array):
        form = choose(path)
        if not rounds(form):
            return array
        quantized = leaf(form, path == "embedding", array)
        check_finite(quantized, path, spec)
        return quantized

    return quantize_array


def check_finite(quantized, path, spec):
    """Raises UserError for a leaf of numbers that are not finite: of weights that were not, or are too large for it."""
    arrays = [array for array in jax.tree.leaves(quantized) if jnp.issubdtype(array.dtype, jnp.floating)]
    if any(isinstance(array, jax.core.Tracer) or not hasattr(array, "addressable_shards") for array in arrays):
        return  # abstract
    if not all(bool(_all_finite(array)) for array in arrays):
        raise UserError(
            f"quant = {spec!r}: {path} has weights that are inf or NaN, or larger than this form can hold; take "
            "'float32', or 'bfloat16' for what is only large"
        )


@jax.jit
def _all_finite(array):
    return jnp.all(jnp.isfinite(array))


def abstract(params, spec, rules=()):
    """The shapes of `quantize`'s tree; of calibrated forms those of rounding to nearest, and AWQ's factors beside."""

    def made(params):
        arrays = {path_of(keys): array for keys, array in jax.tree_util.tree_flatten_with_path(params)[0]}

        def learn(path, form):
            rounded = leaf(dataclasses.replace(form, method="rtn"), path == "embedding", arrays[path])
            if form.method != "awq":
                return rounded
            *stack, K, _ = arrays[path].shape
            return rounded.replace(x_scale=jnp.ones((*stack, 1, K), jnp.float16))

        return quantize(params, spec, rules, learn)

    return jax.eval_shape(made, params)


def form_of(spec):
    """The form a spec names. Raises UserError for one that is none."""
    return build("quant", spec, where="config.quant")


def chooser(spec, rules, where="quantisation rules"):
    """A function of a path that gives its form, None for what has none. Raises UserError as `quantize` does."""
    form = form_of(spec)
    try:
        compiled = [(patterns.compile(pattern, where), form_of(value)) for pattern, value in rules]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} = {rules!r} must be pairs of (regex, spec): {error}") from None
    compiled += [(TABLE, form_of(form.embedding)), (KERNEL, form)]

    def choose(path):
        return next((value for pattern, value in compiled if is_weight(path) and pattern.search(path)), None)

    return choose


def is_weight(path):
    """Whether a parameter is a table, or a kernel that products read: what may have a form."""
    return bool(TABLE.search(path) or KERNEL.search(path))


@functools.partial(jax.jit, static_argnums=(0, 1))
def leaf(form, is_table, array):
    """The leaf of a kernel or a table."""
    return form.leaf(array if is_table else jnp.swapaxes(array, -1, -2), is_table)
