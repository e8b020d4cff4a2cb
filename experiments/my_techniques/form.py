"""Quantized form: 8-bit floats, E4M3 (Micikevicius et al. 2022, arXiv:2209.05433), with a scale per output."""

import dataclasses
import typing

import flax.struct
import jax.numpy as jnp

from efficientllm.quant.base import STATIC, Form, Rows
from efficientllm.registry import register

GREATEST = 448.0  # of E4M3


@flax.struct.dataclass
class Float8(Rows):
    """`values * scale`: float8 `[..., R, K]` and float32 `[..., R, 1]`."""

    values: typing.Any
    scale: typing.Any
    is_table: bool = flax.struct.field(default=False, **STATIC)

    name = "fp8"

    def rows(self):
        return self.values.astype(jnp.float32) * self.scale


@register("quant", "fp8")
@dataclasses.dataclass(frozen=True)
class Float8Form(Form):
    embedding: str = "bfloat16"

    leaf_type = Float8

    def leaf(self, rows, is_table):
        scale = jnp.max(jnp.abs(rows), -1, keepdims=True) / GREATEST
        return Float8((rows / jnp.where(scale > 0, scale, 1)).astype(jnp.float8_e4m3fn), scale, is_table)
