"""Memory checks before a run makes its first array; a refusal names a change that would fit."""

from __future__ import annotations

import dataclasses
import typing

import jax

from efficientllm.architecture import text_encoders
from efficientllm.config.field_keys import name_keys
from efficientllm.cost import available_memory
from efficientllm.errors import UserError
from efficientllm.plan import remedies, workloads
from efficientllm.registry import build, names
from efficientllm.sharding import local_bytes

if typing.TYPE_CHECKING:
    from efficientllm.infer.serving import Serving
    from efficientllm.train.setup import Setup


def check_shapes(setup: Setup) -> None:
    """Raises UserError for a `train.setup.Setup` whose state and gradients exceed memory; called before compilation."""
    room = available_memory.measure_available(setup.config, jax.local_devices())
    if room is None:
        return
    copies = jax.local_device_count() if room.shared else 1
    state = copies * local_bytes(setup.shaped)
    needed = state + copies * local_bytes(setup.shaped.params)
    if room.refuses(state, needed):
        raise _refusal(setup, room, needed, "weights, optimiser and gradients", copies)


def check_compiled(setup: Setup) -> None:
    """Raises UserError if the compiled step exceeds memory; called before the state is made."""
    room, planned = available_memory.measure_available(setup.config, jax.local_devices()), setup.program_memory.value
    if room is None or planned is None:
        return
    copies = jax.local_device_count()
    needed = planned if room.shared else planned // copies
    if room.refuses(0, needed):
        raise _refusal(setup, room, needed, "by the compiler's plan of a step", copies if room.shared else 1)


def check_serving(serving: Serving) -> None:
    """Raises UserError for an `infer.serving.Serving` whose weights and states exceed memory, before they are read."""
    config, room, weights = serving.config, available_memory.measure_available(serving.config, serving.devices), None
    if room is not None:
        weights = serving.weights_bytes(config.quant, config.infer.rules)
    if weights is None:
        return
    if not room.shared:
        room = dataclasses.replace(room, bytes=room.bytes * len(serving.devices), name="free on all devices")
    resident, peak = (size + serving.states_bytes for size in weights)
    if not room.refuses(resident, peak):
        return
    gb, remedy = peak / 1e9, "no form of the weights is small enough"
    for form in remedies.FORMS:
        if not config.infer.rules and (size := serving.weights_bytes(form)[1] + serving.states_bytes) <= min(
            room.bytes, peak
        ):
            remedy = f"with --config.quant='{form}' it would need {size / 1e9:,.1f} GB"
            break
    raise UserError(
        f"{_of(config)} needs {gb:,.1f} GB (weights as {config.quant}, and states of {serving.request}), {room.name}: "
        f"{room.bytes / 1e9:,.1f} GB; {remedy}; to go on regardless: --config.memory_gb={1.01 * gb:.3g}"
    )


def _refusal(setup, room, needed, what, copies):
    gb = needed / 1e9
    return UserError(
        f"{_of(setup.config)} needs {gb:,.1f} GB ({what}), {room.name}: {room.bytes / 1e9:,.1f} GB; "
        f"{_remedy(setup, room, copies)}; to go on regardless: --config.memory_gb={1.01 * gb:.3g}"
    )


def _of(config):
    if config.model.pretrained:
        return f"config.model.pretrained = {config.model.pretrained!r}"
    return f"config.model.size = {config.model.size!r}"


def _remedy(setup, room, copies):
    """Names the first single change that would fit by shapes, or says that none does."""
    from efficientllm.plan import training_step  # not needed by every run

    def total_of(change):
        config = workloads.with_changes(setup.config, change)
        with name_keys(config):
            step = training_step.describe(config, jax.devices(), jax.default_backend())
        least = copies * local_bytes((step.shaped, step.shaped.params))
        return least if least > room.bytes else max(least, copies * step.by_shapes())

    for kind in [*remedies.of_training(setup.config, setup.mesh.shape), *_others(setup.config)]:
        (attempt,) = remedies.attempt([kind], room.bytes, total_of)
        if attempt.fits:
            return f"with {attempt.flags} it would need {attempt.total_bytes / 1e9:,.1f} GB"
    return "no single change of remat, micro-batch, mesh, optimiser, adapter or size is enough"


def _others(config):
    """Changes that alter the training itself, in the form of `remedies.of_training`: optimiser, adapter, size.

    A config that uses one of them already gains nothing by it, so that it does not fit and is not named.
    """
    changes: list[list[remedies.Change]] = [[{"train.optimizer": "lion"}]]
    if config.model.pretrained:
        changes.append([{"adapter": "lora(rank=8)"}])
    return [*changes, *([smaller] if (smaller := _smaller(config)) else [])]


def _smaller(config):
    """The named sizes of its kind, of text or of images, with fewer parameters, largest first."""

    def weights(name):
        shape = build("size", name)
        return shape.num_layers * shape.dim**2

    of_images = config.model.embed != "tokens"
    named = [name for name in names("size") if name != "custom" and name not in text_encoders.PUBLISHED]
    sizes = [name for name in named if (build("size", name).patch is None) != of_images]
    if config.model.pretrained or config.model.size not in sizes:
        return []
    own_weights = weights(config.model.size)
    return [{"model.size": name} for name in sorted(sizes, key=weights, reverse=True) if weights(name) < own_weights]
