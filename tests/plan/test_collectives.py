"""Collectives of compiled steps against the closed formula, on every kind of mesh."""

import importlib.util
import json
import subprocess
import sys

import jax
import pytest

import runs
from configs import base, dit, sd3
from efficientllm import model, sharding
from efficientllm.ffns.moe import MoE
from efficientllm.ops import attention_kernels
from efficientllm.plan import collectives, hlo_cost, hlo_text, training_step, workloads
from tiers import slow_case, slow_except

# The vocabularies are named, so that there is no tokenizer to ask.
SMALL = "custom(num_layers=3, dim=48, num_heads=8, num_kv_heads=4, head_dim=8, hidden=72, rope_base=1e4, vocab_size=88)"
WIDE = (
    "custom(num_layers=6, dim=256, num_heads=4, num_kv_heads=2, head_dim=64, hidden=768, rope_base=1e4, "
    "vocab_size=1024)"
)
MESHES = (
    "data=8",
    "fsdp=8",
    "data=2, fsdp=4",
    "data=2, tensor=4",
    "fsdp=4, tensor=2",
    "data=2, fsdp=2, tensor=2",
)
DROPLESS = "moe(num_experts=8, top_k=2, hidden=40)"
CAPACITY = DROPLESS.replace(")", ", dispatch='capacity')")
SHARED = CAPACITY.replace(")", ", shared_hidden=24, shared_gate=True, bias_rate=0.01)")
MIXTURES = (
    ("data=8", DROPLESS),
    ("fsdp=8", DROPLESS),
    ("data=2, fsdp=4", DROPLESS),
    ("fsdp=4, tensor=2", DROPLESS),
    ("expert=8", CAPACITY),
    ("fsdp=2, expert=4", CAPACITY),
    ("data=2, expert=4", CAPACITY),
    ("expert=4, tensor=2", CAPACITY),
    ("fsdp=8", "swiglu(use_bias=True)"),
    ("fsdp=4, tensor=2", DROPLESS.replace(")", ", activation='gelu_tanh', use_bias=True)")),
    ("fsdp=2, expert=2, tensor=2", CAPACITY.replace(")", ", use_bias=True)")),
)
pytestmark = pytest.mark.xdist_group("collectives")


def described(mesh="fsdp=8", platform="cpu", **changes):
    config = base.get_config()
    config.model.unroll = 0
    config.mesh, config.model.size = mesh, SMALL
    config.train.batch_size, config.train.length = 16, 26
    config.update_from_flattened_dict(changes)
    return training_step.describe(config, jax.devices()[:8], platform)


def sent(collectives):
    """Bytes that a device sends in a step, by kind."""
    return {kind: total["wire_bytes"] for kind, total in hlo_cost.by_kind(collectives).items()}


def compiled(described_step):
    done = workloads.compile_program(described_step, training_step.traced(described_step)[0])
    return sent(hlo_cost.collectives(hlo_text.Program(done.text), 8))


def scalars(described_step):
    """Bytes at most of what the formula leaves out: two norms of every gradient over each axis, a few counts, and
    each router's loads, probabilities and three scalars."""
    axes = sum(size > 1 for size in described_step.mesh.shape.values())
    routers = sum(2 * ffn.num_experts + 3 for _, ffn in model.parts(described_step.lm) if isinstance(ffn, MoE))
    return (
        axes
        * 2
        * 4
        * (2 * len(jax.tree.leaves(described_step.shaped.params)) + 8 + described_step.lm.num_groups * routers)
    )


def norms(described_step, width):
    """Bytes of the norms' scales: of those of each layer, and the last."""
    return width * described_step.lm.dim * (2 * described_step.lm.num_layers + 1)


@pytest.mark.parametrize(
    "mesh, changes",
    [*slow_except([(mesh, {}) for mesh in MESHES], (MESHES[0], {}), (MESHES[-1], {}))]
    + [("data=2, fsdp=2, tensor=2", {"model.tied": False}), ("fsdp=4, tensor=2", {"train.accumulate": 2})]
    + [("fsdp=2, expert=2, tensor=2", {"model.ffn": SHARED})]
    + [slow_case("fsdp=2, expert=4", {})]
    + [slow_case(mesh, {"model.ffn": ffn}) for mesh, ffn in MIXTURES]
    + [
        slow_case("fsdp=2, expert=4", {"model.ffn": CAPACITY} | changes)
        for changes in ({"train.accumulate": 2}, {"model.precision": "bfloat16"}, {"model.precision": "mixed"})
    ],
)
def test_a_step_sends_what_the_formula_says(mesh, changes):
    described_step = described(mesh, **changes)
    ours, theirs = sent(collectives.closed(described_step)), compiled(described_step)
    assert ours.keys() == theirs.keys()
    more = {kind: theirs[kind] - ours[kind] for kind in theirs}
    assert 0 <= more.pop("all-reduce") <= scalars(described_step) < 0.01 * sum(theirs.values())
    assert set(more.values()) <= {0}, (ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", slow_except(("data=8", "fsdp=8", "data=2, fsdp=4"), "fsdp=8"))
def test_a_step_on_pictures_sends_what_the_formula_says(mesh):
    """Labels are looked up as tokens are; biases, and kernels that multiply the batch, are gathered once."""
    config = dit.get_config()
    changes = {"model.size": SMALL.replace("vocab_size=88", "patch=4"), "model.parameters_of": "", "mesh": mesh}
    changes |= {"model.embed": "patches(side=16, channels=4, classes=7)", "model.unroll": 0, "train.batch_size": 16}
    config.update_from_flattened_dict(changes)
    described_step = training_step.describe(config, jax.devices()[:8], "cpu")
    ours, theirs = sent(collectives.closed(described_step)), compiled(described_step)
    assert ours.keys() == theirs.keys()
    more = {kind: theirs[kind] - ours[kind] for kind in theirs}
    assert 0 <= more.pop("all-reduce") <= scalars(described_step)
    assert set(more.values()) <= {0}, (ours, theirs)
    config.mesh = "fsdp=4, tensor=2"
    assert collectives.closed(training_step.describe(config, jax.devices()[:8], "cpu")) is None


@pytest.mark.slow
def test_a_model_that_reads_texts_sends_the_gradients_of_what_is_read():
    """It has no table of labels, and of the last queries of the text there is no gradient."""
    config = sd3.get_config("tiny")
    config.update_from_flattened_dict({"model.unroll": 0, "train.batch_size": 8, "mesh": "data=8"})
    described_step = training_step.describe(config, jax.devices()[:8], "cpu")
    ours, theirs = sent(collectives.closed(described_step)), compiled(described_step)
    assert ours.keys() == theirs.keys() == {"all-reduce"}
    dim = described_step.lm.dim
    unread = 2 * 7 / 8 * 4 * (dim * dim + 2 * dim)
    assert (
        abs(theirs["all-reduce"] - ours["all-reduce"]) <= scalars(described_step) + unread < 0.05 * ours["all-reduce"]
    )


@pytest.mark.slow
def test_over_a_wide_tensor_axis_xla_sends_the_routers_gradients_too():
    """It divides a router's product among the axis's devices, who put it together again: its bytes, and no more."""
    described_step = described("fsdp=2, tensor=4", **{"model.ffn": DROPLESS})
    ours, theirs = sent(collectives.closed(described_step)), compiled(described_step)
    routers = 4 * described_step.lm.num_layers * described_step.lm.dim * 8
    assert all(abs(theirs.get(kind, 0) - ours.get(kind, 0)) <= routers for kind in ours | theirs), (ours, theirs)


@pytest.mark.parametrize("chunk", [slow_case(256), 5])
def test_keys_and_values_are_sent_once_for_all_chunks_of_queries(chunk, monkeypatch):
    """And so are their gradients."""
    monkeypatch.setattr(attention_kernels, "GATHERED_CHUNK", chunk)
    described_step = described("fsdp=4, sequence=2")
    ours, theirs = sent(collectives.closed(described_step)), compiled(described_step)
    assert ours["all-gather"] == theirs["all-gather"] and ours["all-to-all"] == theirs["all-to-all"]
    # The norms' gradients are summed over the sequence, then over the rows, whole each time.
    apart = norms(described_step, 4) * (2 * 1 / 2 + 2 * 3 / 4 - 2 * 7 / 8)
    assert 0 <= theirs["all-reduce"] - ours["all-reduce"] - apart <= scalars(described_step)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.mixer": "mamba"},
        {"model.ffn": DROPLESS, "mesh": "fsdp=4, sequence=2"},
        {"model.ffn": DROPLESS, "platform": "tpu"},
        {"model.mixer": "mqa", "mesh": "data=4, tensor=2"},
        {"model.remat": "full"},
        {"adapter": "lora(rank=2)"},
    ],
)
def test_what_the_formula_does_not_know_is_not_guessed(changes):
    assert collectives.closed(described(**changes)) is None


@pytest.mark.parametrize(
    "axes, expected",
    [
        (("data",), {(0, 4), (1, 5), (2, 6), (3, 7)}),
        (("data", "fsdp"), {(0, 2, 4, 6), (1, 3, 5, 7)}),
        (("tensor",), {(0, 1), (2, 3), (4, 5), (6, 7)}),
        (("sequence",), {(index,) for index in range(8)}),
    ],
)
def test_groups_differ_in_their_axes_alone(axes, expected):
    assert set(collectives.groups(sharding.make_mesh("data=2, fsdp=2, tensor=2"), axes)) == expected


def planned(plugin, folder, **changes):
    """Bytes sent by kind, as the platform's compiler has it; in a process of its own, for a plugin must be found before
    JAX starts."""
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed")
    overrides = {key.replace(".", "__"): value for key, value in changes.items()}
    argv = runs.arguments("nowhere", folder, task="plan", plan__devices=8, **overrides)
    argv = [sys.executable, "-m", "efficientllm.main", *argv]
    done = subprocess.run(argv, cwd=runs.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    collectives = json.loads((folder / "record.json").read_text())["predicted"]["collectives"]
    return {kind: collective["wire_bytes"] for kind, collective in collectives.items()}


WIDE_DROPLESS = DROPLESS.replace("40", "256")
WIDE_CAPACITY = CAPACITY.replace("40", "256")


@pytest.mark.parametrize(
    "hardware, mesh, ffn",
    [
        ("h100", "fsdp=8", "swiglu"),
        ("v5e", "fsdp=8", "swiglu"),
        slow_case("h100", "fsdp=4, tensor=2", "swiglu"),
        slow_case("v5e", "fsdp=4, tensor=2", "swiglu"),
        slow_case("h100", "fsdp=4, sequence=2", "swiglu"),
        slow_case("h100", "fsdp=8", WIDE_DROPLESS),
        slow_case("h100", "fsdp=8", WIDE_CAPACITY),
        slow_case("h100", "fsdp=2, expert=4", WIDE_CAPACITY),
        slow_case("h100", "fsdp=4, tensor=2", WIDE_CAPACITY),
    ],
)
def test_gradients_are_reduce_scattered_where_the_platform_can(hardware, mesh, ffn, tmp_path):
    """And nothing more is sent than the formula says, but for scalars, and norms that are summed whole."""
    plugin = {"h100": "jax_cuda13_plugin", "v5e": "libtpu"}[hardware]
    changes = {"mesh": mesh, "model.size": WIDE, "model.precision": "bfloat16", "model.ffn": ffn}
    changes |= {"train.batch_size": 8, "train.length": 256}
    theirs = planned(plugin, tmp_path, **{"plan.hardware": hardware}, **changes)
    described_step = described(platform="gpu" if hardware == "h100" else "tpu", **changes)
    # A norm's scale may be summed whole, and on TPUs be gathered as a sum in both passes: twice its bytes each time.
    ours, small = sent(collectives.closed(described_step)), scalars(described_step) + 6 * norms(described_step, 2)
    assert small < 0.005 * sum(ours.values()) and ours["reduce-scatter"] > sum(ours.values()) / 10
    for kind in ours | theirs:
        more = theirs.get(kind, 0) - ours.get(kind, 0)
        assert more <= small, (kind, ours, theirs)
        # A TPU's compiler gathers a head that is a table's transpose once for both passes.
        assert more >= -small or (hardware, kind) == ("v5e", "all-gather"), (kind, ours, theirs)
