"""Sharding: a mesh does not change results, and no device ever holds a whole stack of layers."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import hlo
from configs import base
from efficientllm import model as models
from efficientllm import sharding
from efficientllm.architecture import from_config
from efficientllm.errors import FieldError, UserError
from efficientllm.ffns import dispatch
from efficientllm.ffns.moe import Router
from efficientllm.ops.attention import Context, Mask, attend
from efficientllm.plan.hlo_cost import collectives
from efficientllm.plan.hlo_text import Program as Text
from efficientllm.train import config_checks, step
from tiers import slow_case

# Sizes that no two kinds of array share, so that a shape tells what an array is.
N, B, T, D, V, STEPS = 6, 16, 26, 48, 88, 6
TIE = 2e-6  # scores nearer than this are ordered by rounding: a step from one state moves logits by up to 5e-7
SIZE = f"tiny(num_layers={N}, dim={D}, num_heads=8, num_kv_heads=4, head_dim=8, hidden=72)"
FFNS = {
    "dense": "swiglu",
    "moe": "moe(num_experts=8, top_k=2, hidden=40, load_balance=0.01, z_loss=0.001)",
    "capacity": "moe(num_experts=8, top_k=2, hidden=40, dispatch='capacity', capacity_factor=1.25)",
}
CUBE = "data=2, fsdp=2, tensor=2"
LONG = "fsdp=4, sequence=2"
EXPERTS = "fsdp=2, expert=4"
pytestmark = pytest.mark.xdist_group("sharding")  # they share compiled programs


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled training step on a mesh and what it takes."""

    lm: models.Backbone
    mesh: jax.sharding.Mesh
    create: callable
    shaped: step.TrainState
    shardings: step.TrainState
    compiled: jax.stages.Compiled


@functools.cache
def program(ffn, mesh_spec, accumulate):
    config = base.get_config()
    config.model.unroll = 0
    config.model.size, config.model.ffn = SIZE, FFNS[ffn]
    config.train.steps, config.train.accumulate, config.train.schedule = STEPS, accumulate, "constant(peak=0.01)"
    # Adam divides by the gradient's own size: where that is rounding alone, 1e-10, an eps of 1e-8 makes a step of it.
    config.train.optimizer = "adamw(b1=0.9, b2=0.95, eps=1e-5)"
    lm = from_config.from_config(config.model, V)
    mesh = sharding.make_mesh(mesh_spec, jax.devices()[: 1 if mesh_spec == "data=1" else 8])
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(step.init_state(lm, config.train, 0, T))
        shardings = sharding.shardings(abstract, mesh)
        shaped = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            nn.unbox(abstract),
            shardings,
        )
        train_step = step.jit_train_step(lm, config.train, mesh, shardings)
        compiled = train_step.lower(shaped, batches(mesh)[0]).compile()
    return Program(lm, mesh, step.jit_create(lm, config.train, 1, T, shardings), shaped, shardings, compiled)


def batches(mesh):
    """Rows of two documents; a third of the targets weigh nothing, unevenly over the rows."""
    random, index = np.random.default_rng(0), np.arange(T, dtype=np.int32)
    packed = []
    for _ in range(STEPS):
        ids = random.integers(0, V // 4, (B, T + 1), np.int32)
        second = index >= random.integers(1, T, (B, 1))
        first_of_second = np.argmax(second, 1, keepdims=True)
        batch = {
            "tokens": ids[:, :-1],
            "targets": ids[:, 1:],
            "segments": 1 + second.astype(np.int32),
            "positions": np.where(second, index - first_of_second, index).astype(np.int32),
            "weights": (random.random((B, T)) < np.linspace(0.2, 1.0, B)[:, None]).astype(np.float32),
        }
        packed.append(jax.device_put(batch, sharding.batch_sharding(mesh)))
    return packed


@functools.cache
def states(ffn):
    """The state before each step on one device, and after the last, on the host."""
    made = program(ffn, "data=1", 1)
    with jax.set_mesh(made.mesh):
        state = made.create()
        collected = [jax.device_get(state)]
        for batch in batches(made.mesh):
            state, _ = made.compiled(state, batch)
            collected.append(jax.device_get(state))
    return collected


@functools.cache
def curve(ffn, mesh_spec, accumulate):
    """Loss and gradient norm of each step, from the state that one device has before it.

    Not from the mesh's own: a token whose experts' scores are nearer than rounding takes another expert there, and all
    later steps are of another model.
    """
    made = program(ffn, mesh_spec, accumulate)
    metrics_of_steps = []
    with jax.set_mesh(made.mesh):
        for before, after, batch in zip(states(ffn), states(ffn)[1:], batches(made.mesh), strict=False):
            state, metrics = made.compiled(jax.device_put(before, made.shardings), batch)
            metrics_of_steps.append([float(metrics[key]) for key in ("loss", "total_loss", "grad_norm")])
            if is_clear(ffn, int(before.step)):
                # A hundredth of a learning rate: of a gradient of Adam's eps, 1e-5, rounding is some 1e-3.
                jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), state, after)
    return np.array(metrics_of_steps)


@functools.cache
def is_clear(ffn, step):
    """True where no token's first, second or third expert (top_k + 1) are within TIE of one another before `step`."""
    made = program(ffn, "data=1", 1)
    lm, params = models.unroll(made.lm, states(ffn)[step].params)
    batch = jax.device_get(batches(made.mesh)[step])
    ctx = Context.packed(batch["positions"], batch["segments"])
    _, captured = lm.apply(
        {"params": params},
        batch["tokens"],
        ctx,
        readout=False,
        capture_intermediates=lambda module, _: isinstance(module, Router),
        mutable=["intermediates"],
    )
    logits = [leaf for leaf in jax.tree.leaves(captured) if leaf.ndim == 3]
    assert len(logits) == (0 if ffn == "dense" else N)
    best = (jnp.sort(leaf, -1)[..., -3:] for leaf in logits)
    return all(float(jnp.min(jnp.diff(scores))) > TIE for scores in best)


@pytest.mark.parametrize(
    "ffn, mesh_spec, accumulate",
    [
        slow_case("dense", "data=8", 1),
        slow_case("dense", "fsdp=8", 1),
        slow_case("dense", "tensor=8", 1),
        slow_case("dense", CUBE, 1),
        slow_case("dense", "fsdp=4, tensor=2", 2),
        slow_case("dense", LONG, 2),
        slow_case("dense", "fsdp=2, tensor=2, sequence=2", 1),
        slow_case("moe", "fsdp=8", 1),
        slow_case("moe", LONG, 1),
        slow_case("moe", CUBE, 1),
        slow_case("capacity", EXPERTS, 1),
        slow_case("capacity", "expert=8", 1),
        slow_case("capacity", "expert=4, tensor=2", 1),
        slow_case("capacity", "expert=4, sequence=2", 1),
        ("dense", EXPERTS, 1),
    ],
)
def test_every_mesh_gives_the_curve_of_one_device(ffn, mesh_spec, accumulate):
    on_one_device, on_mesh = curve(ffn, "data=1", 1), curve(ffn, mesh_spec, accumulate)
    assert abs(on_one_device[-1, 0] - on_one_device[0, 0]) > 0.05  # it trains
    clear = [step for step in range(STEPS) if is_clear(ffn, step)]
    assert len(clear) >= STEPS // 2
    np.testing.assert_allclose(on_mesh[clear], on_one_device[clear], rtol=5e-6)


@pytest.mark.parametrize("mesh_spec", ["data=1", CUBE])
def test_a_compiled_step_places_arrays_of_the_host_as_its_batch_is_sharded(mesh_spec):
    made = program("dense", mesh_spec, 1)
    rows = jax.device_get(batches(made.mesh)[0])
    shardings = dict.fromkeys(rows, sharding.batch_sharding(made.mesh))
    batch = {**rows, "unread": np.zeros(B)}
    results = []
    with jax.set_mesh(made.mesh):
        for place in (sharding.to_device, sharding.to_compiled):
            placed = place(batch, shardings)
            assert placed.keys() == shardings.keys()
            results.append(jax.device_get(made.compiled(made.create(), placed)))
    assert all(isinstance(rows, np.ndarray) for rows in placed.values())
    jax.tree.map(np.testing.assert_array_equal, *results)
    with pytest.raises(FieldError, match="has no weights, which the model is conditioned on"):
        sharding.to_compiled({name: rows for name, rows in batch.items() if name != "weights"}, shardings)


def stacks(made):
    """Shapes of the layers' parameters that the mesh splits, each stacked over the layers."""
    layers = (jax.tree.leaves(tree.params["groups"]) for tree in (made.shaped, made.shardings))
    return {leaf.shape for leaf, where in zip(*layers, strict=True) if where.spec != P()}


def makes(text, shapes):
    """The instructions that make an array of one of these shapes, whatever the order of its axes."""
    wanted = {tuple(sorted(shape)) for shape in shapes}
    return [
        instruction
        for instruction in hlo.instructions(text)
        if any(tuple(sorted(shape)) in wanted for shape in instruction.shapes)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("ffn", [slow_case("dense"), "moe"])
def test_no_device_ever_holds_a_whole_stack_of_layers(ffn):
    """Neither of parameters nor of gradients nor of the optimizer's state: a layer is gathered, in the loop."""
    made = program(ffn, "fsdp=8", 1)
    text = made.compiled.as_text()
    assert makes(text, stacks(made)) == []
    kernels = {shape[1:] for shape in stacks(made) if len(shape) > 2}
    gathered = [instruction for instruction in makes(text, kernels) if instruction.op == "all-gather"]
    assert len(gathered) >= 2 * 5 and all(instruction.in_loop for instruction in gathered), gathered


@pytest.mark.slow
def test_a_gathered_stack_would_be_seen():
    made = program("dense", "fsdp=8", 1)
    whole = sharding.replicated(made.mesh)
    gather = jax.jit(lambda kernels: jax.lax.with_sharding_constraint(kernels, whole) * 2.0, out_shardings=whole)
    kernels = made.shaped.params["groups"]["block_0"]["ffn"]["up"]["kernel"]
    instructions = makes(gather.lower(kernels).compile().as_text(), stacks(made))
    assert "all-gather" in [instruction.op for instruction in instructions]
    assert not any(instruction.in_loop for instruction in instructions)


@pytest.mark.parametrize("mesh_spec, accumulate", [slow_case("fsdp=8", 1), (CUBE, 1), slow_case("fsdp=4, tensor=2", 2)])
def test_the_embedding_look_up_moves_tokens_and_not_the_table(mesh_spec, accumulate):
    look_ups = [
        instruction
        for instruction in hlo.instructions(program("dense", mesh_spec, accumulate).compiled.as_text())
        if "_take" in instruction.text and instruction.op in ("all-gather", "collective-permute")
    ]
    assert all(len(shape) == 2 and D not in shape for look_up in look_ups for shape in look_up.shapes), look_ups


def test_a_router_chooses_where_its_tokens_are():
    """No layer gathers the scores of the whole batch."""
    instructions = hlo.instructions(program("moe", "fsdp=8", 1).compiled.as_text())
    gathered = [
        shape
        for instruction in instructions
        if instruction.op == "all-gather" and instruction.in_loop
        for shape in instruction.shapes
    ]
    assert gathered and not any(shape[0] in (B, B * T) for shape in gathered), gathered


def test_a_step_sends_rows_to_their_experts_and_nothing_else():
    """Each layer: rows there and back, forward and backward, and with them their weights; no kernels of experts over
    the axis."""
    made = program("capacity", EXPERTS, 1)
    sent_collectives = collectives(Text(made.compiled.as_text()), 8)
    axis = {(0, 1, 2, 3), (4, 5, 6, 7)}
    over_experts = [
        collective for collective in sent_collectives if {tuple(sorted(group)) for group in collective.groups} == axis
    ]
    rows = 8 * (B // 8) * dispatch.rows_per_expert(T, 8, 2, 1.25)
    sent = sum(collective.times * collective.bytes for collective in over_experts if collective.kind == "all-to-all")
    assert sent == N * 4 * rows * (4 * D + 2)
    kernel = 4 * 2 * D * 40  # of a device's two experts, whole after the gather over fsdp
    text = [instruction for instruction in hlo.instructions(made.compiled.as_text()) if instruction.op == "all-gather"]
    assert kernel in {collective.bytes for collective in sent_collectives if collective.kind == "all-gather"}
    assert not [instruction for instruction in text for shape in instruction.shapes if {8, D, 40} <= set(shape)], text


def test_only_keys_and_values_of_a_row_are_gathered_over_the_sequence():
    """What is as long as a row on a device: keys and values, in the loop over layers or their gradients; no activation
    of the model's width, no hidden layer, no logits."""
    rows, whole = B // 4, []
    for instruction in hlo.instructions(program("dense", LONG, 2).compiled.as_text()):
        if instruction.op in ("all-gather", "all-to-all"):
            sizes = [
                tuple(size for size in shape if size > 1) for shape in instruction.shapes
            ]  # 2 are of documents' ids
            whole += [shape for shape in sizes if T in shape and rows // 2 in shape and len(shape) > 2]
    assert whole and all(set(shape) >= {4, 8} for shape in whole), whole  # KV heads, and their width


def test_a_kernel_that_needs_whole_rows_is_refused_by_name():
    q_BTHK, message = jnp.zeros((2, 8, 4, 8)), "attention_kernel = 'chunked': needs whole rows.*sequence.*take 'auto'"
    with jax.set_mesh(sharding.make_mesh("fsdp=2, sequence=4")), pytest.raises(UserError, match=message):
        jax.eval_shape(lambda q: attend(q, q, q, Mask(), "chunked"), q_BTHK)


def test_processes_that_hold_the_same_rows_read_the_same_part():
    assert sharding.process_share(sharding.make_mesh(LONG)) == (0, 1)
    row_shards = {"fsdp=8": [0, 1, 2, 3], "fsdp=4, sequence=2": [0, 1, 2, 3], "data=2, sequence=4": [0, 0, 1, 1]}
    row_shards["sequence=8"] = [0, 0, 0, 0]
    row_shards["fsdp=2, expert=4"], row_shards["expert=2, tensor=4"] = [0, 1, 2, 3], [0, 0, 1, 1]
    for mesh_spec, expected in row_shards.items():
        mesh = sharding.make_mesh(mesh_spec)
        owner = {device: index // 2 for index, device in enumerate(mesh.devices.flat)}  # two devices a process
        assert [sharding.share_of(mesh, process, owner.get) for process in range(4)] == [
            (index, max(expected) + 1) for index in expected
        ]
    mesh = sharding.make_mesh("data=4, tensor=2")
    with pytest.raises(UserError, match="rows that overlap"):
        sharding.share_of(mesh, 0, {device: index // 3 for index, device in enumerate(mesh.devices.flat)}.get)


def test_rows_that_the_sequence_does_not_divide_are_refused():
    train = base.get_config().train
    train.length = 30
    with pytest.raises(UserError, match="config.train.length = 30: .*sequence.* 4 devices; 32 would do"):
        config_checks.check_train(train, sharding.make_mesh("fsdp=2, sequence=4"))


def test_the_state_is_created_split_and_donated():
    made = program("dense", "fsdp=8", 1)
    with jax.set_mesh(made.mesh):
        init = made.create.lower().compile()
    assert makes(init.as_text(), stacks(made)) == []
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(made.shaped))
    split = sum(
        math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, where in zip(jax.tree.leaves(made.shaped), jax.tree.leaves(made.shardings), strict=True)
    )
    assert split < whole / 7.5
    tables = 16 * len(jax.tree.leaves(made.shaped))  # of pointers: an output is a tuple
    assert split <= init.memory_analysis().output_size_in_bytes <= split + tables
    assert split <= made.compiled.memory_analysis().alias_size_in_bytes <= split + tables
    assert init.memory_analysis().temp_size_in_bytes < whole / 4


@pytest.mark.slow
def test_moments_lie_where_their_parameters_lie():
    made = program("moe", CUBE, 1)
    params = jax.tree.leaves(made.shardings.params)
    assert sum(where.spec != P() for where in params) == len(params)
    adam = next(state for state in made.shardings.opt_state if hasattr(state, "mu"))
    assert jax.tree.leaves(adam.mu) == jax.tree.leaves(adam.nu) == params


@pytest.mark.parametrize(
    "axes, shape, expected",
    [
        (("vocab", "embed"), (64, 32), P("tensor", "fsdp")),
        (("layers", "embed", "mlp"), (3, 32, 64), P(None, "fsdp", "tensor")),
        (("expert", "embed", "mlp"), (8, 32, 64), P("fsdp", None, "tensor")),  # fsdp is taken
        (("expert", "embed", "mlp"), (3, 32, 64), P(None, "fsdp", "tensor")),  # 3 experts do not divide: fsdp is free
        (("heads", "mlp"), (64, 64), P("tensor", None)),
        (("embed", "vocab"), (33, 63), P(None, None)),
        (("batch", None, None), (8, 5, 32), P(("data", "fsdp"), None, None)),
        (("batch", None), (2, 5), P(None, None)),  # all axes or none
        (("group_batch", None, "embed"), (8, 5, 32), P("data", None, "fsdp")),
        (("batch", None, "channels"), (8, 5, 32), P(("data", "fsdp"), None, "tensor")),
        (("unheard of", None), (8, 8), P(None, None)),
        ((), (), P()),
    ],
)
def test_spec_takes_an_axis_once_and_only_where_it_divides(axes, shape, expected):
    assert sharding.spec(axes, shape, sharding.make_mesh(CUBE)) == expected


def test_an_axis_of_one_device_is_not_named():
    assert sharding.spec(("vocab", "embed"), (64, 32), sharding.make_mesh("fsdp=8")) == P(None, "fsdp")
    assert sharding.spec(("batch",), (8,), sharding.make_mesh("fsdp=8")) == P("fsdp")


def test_an_axis_of_experts_divides_them_alone_and_all_else_as_fsdp():
    mesh = sharding.make_mesh("fsdp=2, expert=2, tensor=2")
    assert sharding.spec(("expert", "embed", "mlp"), (8, 32, 64), mesh) == P("expert", "fsdp", "tensor")
    assert sharding.spec(("embed", "mlp"), (32, 64), mesh) == P(("fsdp", "expert"), "tensor")
    assert sharding.spec(("embed", "mlp"), (34, 64), mesh) == P("fsdp", "tensor")  # 34 / 4 is none
    assert sharding.spec(("batch", "length"), (8, 6), mesh) == P(("fsdp", "expert"), None)


def test_tokens_and_channels_are_divided_over_the_sequence():
    mesh = sharding.make_mesh("fsdp=2, tensor=2, sequence=2")
    assert sharding.spec(("batch", "length", "heads"), (8, 6, 4), mesh) == P("fsdp", "sequence", "tensor")
    assert sharding.spec(("batch", "length"), (8, 5), mesh) == P("fsdp", None)
    assert sharding.spec(("batch", None, "channels"), (8, 5, 12), mesh) == P("fsdp", None, ("tensor", "sequence"))
    assert sharding.spec(("batch", None, "channels"), (8, 5, 6), mesh) == P("fsdp", None, "tensor")  # 6 / 4 is none


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, "batch", "embed") is x
