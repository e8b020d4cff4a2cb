"""Runs that would not fit into memory, refused before their first array is made, with the change that would fit."""

import dataclasses

import jax

from efficientllm.cost import available_memory
from efficientllm.errors import UserError
from efficientllm.plan import remedies
from efficientllm.registry import build, names
from efficientllm.sharding import local_bytes


def check_shapes(run):
    """Refuses a `train.setup.Setup` whose state alone is too large: before it is compiled. Raises UserError."""
    room = available_memory.measure_available(run.config, jax.local_devices())
    if room is None:
        return
    copies = jax.local_device_count() if room.shared else 1
    state = copies * local_bytes(run.shaped)
    needed = state + copies * local_bytes(run.shaped.params)
    if room.refuses(state, needed):
        raise _refusal(run, room, needed, "weights, optimiser and gradients", copies)


def check_compiled(run):
    """Refuses a step for which the compiler plans too much: before its state is made. Raises UserError."""
    room, planned = available_memory.measure_available(run.config, jax.local_devices()), run.program_memory.value
    if room is None or planned is None:
        return
    copies = jax.local_device_count()
    needed = planned if room.shared else planned // copies
    if room.refuses(0, needed):
        raise _refusal(run, room, needed, "by the compiler's plan of a step", copies if room.shared else 1)


def check_serving(run):
    """Refuses a `Serving` whose weights and states are too large, before one is read. Raises UserError."""
    config, room, weights = run.config, available_memory.measure_available(run.config, run.devices), None
    if room is not None:
        weights = run.weights_bytes(config.quant, config.infer.rules)
    if weights is None:
        return
    if not room.shared:
        room = dataclasses.replace(room, bytes=room.bytes * len(run.devices), name="free on all devices")
    kept, most = (each + run.states_bytes for each in weights)
    if not room.refuses(kept, most):
        return
    gb, remedy = most / 1e9, "no form of the weights is small enough"
    for form in remedies.FORMS:
        if not config.infer.rules and (size := run.weights_bytes(form)[1] + run.states_bytes) <= min(room.bytes, most):
            remedy = f"with --config.quant='{form}' it would need {size / 1e9:,.1f} GB"
            break
    raise UserError(
        f"{_of(config)} needs {gb:,.1f} GB (weights as {config.quant}, and states of {config.infer.batch_size} x "
        f"{run.length} tokens), {room.name}: {room.bytes / 1e9:,.1f} GB; {remedy}; to go on regardless: "
        f"--config.memory_gb={1.01 * gb:.3g}"
    )


def _refusal(run, room, needed, what, copies):
    gb = needed / 1e9
    return UserError(
        f"{_of(run.config)} needs {gb:,.1f} GB ({what}), {room.name}: {room.bytes / 1e9:,.1f} GB; "
        f"{_remedy(run, room, copies)}; to go on regardless: --config.memory_gb={1.01 * gb:.3g}"
    )


def _of(config):
    if config.model.pretrained:
        return f"config.model.pretrained = {config.model.pretrained!r}"
    return f"config.model.size = {config.model.size!r}"


def _remedy(run, room, copies):
    """The first single change that would fit, by shapes, or the words that none does."""
    from efficientllm.plan import training_step  # not needed by every run

    def total_of(change):
        one = training_step.describe(training_step.changed(run.config, change), jax.devices(), jax.default_backend())
        least = copies * local_bytes((one.shaped, one.shaped.params))
        return least if least > room.bytes else max(least, copies * one.by_shapes())

    for kind in [*remedies.of_training(run.config, run.mesh.shape), *_others(run.config)]:
        (tried,) = remedies.attempt([kind], room.bytes, total_of)
        if tried.fits:
            return f"with {tried.flags} it would need {tried.total_bytes / 1e9:,.1f} GB"
    return "no single change of remat, micro-batch, mesh, optimiser, adapter or size is enough"


def _others(config):
    """Changes of what is trained, as `changes.of_training` lists them: the optimiser, what learns, the size."""
    found = []
    if config.adapter == "full" and config.train.optimizer.startswith("adamw"):
        found.append([{"train.optimizer": "lion"}])
    if config.model.pretrained and config.adapter == "full":
        found.append([{"adapter": "lora(rank=8)"}])
    return [*found, *([smaller] if (smaller := _smaller(config)) else [])]


def _smaller(config):
    """Presets of fewer weights, the largest first."""

    def weights(name):
        shape = build("size", name)
        return shape.num_layers * shape.dim**2

    known = [name for name in names("size") if name != "custom"]
    if config.model.pretrained or config.model.size not in known:
        return []
    ours = weights(config.model.size)
    return [{"model.size": name} for name in sorted(known, key=weights, reverse=True) if weights(name) < ours]
