"""Rules for config values that speak of devices: meshes, residuals, hardware; `value_rules` says what a rule is."""

import typing

from efficientllm import registry
from efficientllm.errors import FieldError, UserError, did_you_mean, short_repr
from efficientllm.registry import catalogue


def check_mesh(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """Sizes of mesh axes: whole numbers of devices, at most one of them -1."""
    axes = catalogue.constant("efficientllm.sharding", "AXES")
    try:
        _, sizes = registry.parse_spec(f"mesh({value})")
    except UserError:
        raise UserError(
            f"{where} = {short_repr(value)}: is not a mesh; write sizes of axes: 'data=2, fsdp=-1'"
        ) from None
    for axis, size in sizes.items():
        if axis not in axes:
            raise UserError(
                f"{where} = {short_repr(value)}: no mesh axis {axis!r}; axes: {', '.join(axes)}"
                f"{did_you_mean(axis, axes)}"
            )
        if type(size) is not int or not (size == -1 or 1 <= size <= 2**20):
            raise UserError(
                f"{where} = {short_repr(value)}: {axis} must be a whole number of devices, or -1 for all left"
            )
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"{where} = {short_repr(value)}: only one axis may be -1")


def check_remat(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """`none`, `full`, or a policy of jax.checkpoint_policies. Only the last imports JAX."""
    if value not in ("none", "full"):
        from efficientllm.ops import rematerialization

        try:
            rematerialization.policy(value)
        except FieldError as error:
            raise UserError(f"{where} = {short_repr(value)}: {error.problem}") from None


def check_hardware(where: str, value: typing.Any, has_plugins: bool = False) -> None:
    """A device of the planner's hardware table."""
    from efficientllm.cost import hardware_table

    hardware_table.find_hardware(value, where)
