"""Contract checks of quantized forms, optimizers, schedules, data sources, tokenizers, samplers and solvers."""

import functools
import json
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import contract
from efficientllm import model, sharding
from efficientllm.adapters import base as adapters
from efficientllm.data import modality
from efficientllm.data.corpus import Corpus
from efficientllm.data.images import ImageData
from efficientllm.errors import UserError
from efficientllm.quant import apply
from efficientllm.registry import build, names, spec_parameters
from efficientllm.weights import Weight, axes, matmul, resident_bytes, take

ROWS, K, N = 5, 96, 40  # rows of the input, inputs and outputs of the kernel


@contract.check("quant", quick=("int8",))
def check_form(kind, spec):
    """A quantized kernel multiplies, stacks, shards and looks up like its dequantized array, and is smaller."""

    def say(what):
        return f"{kind} {spec}: {what}"

    noise = np.random.default_rng(0)
    stack = noise.standard_normal((3, K, N)).astype(np.float32)
    packed = apply.quantize({"kernel": jnp.asarray(stack)}, spec)["kernel"]
    assert isinstance(packed, Weight), say("leaf(rows, is_table) gives a weights.Weight, such as a quant.base.Rows")
    dense = packed.dense()
    assert packed.shape == dense.shape == stack.shape, say(f"its shape is {packed.shape}, dense() {dense.shape}")
    assert dense.dtype == jnp.float32, say(f"dense() is float32, not {dense.dtype}")
    error = np.linalg.norm(dense - stack) / np.linalg.norm(stack)
    assert error < 0.3, say(f"of normal numbers it keeps too little: {error:.3g} of their norm is lost")
    assert resident_bytes(packed) < stack.nbytes, say("it takes no less memory than float32")
    kernel = jax.tree.map(lambda leaf: leaf[1], packed)
    np.testing.assert_array_equal(
        kernel.dense(), dense[1], say("its arrays have the stack's leading axes, as the kernel has")
    )
    x = noise.standard_normal((ROWS, K)).astype(np.float32)
    product, exact = matmul(x, kernel, "float32"), x @ dense[1]
    error = np.linalg.norm(product - exact) / np.linalg.norm(exact)
    assert error < 5e-3, say(f"matmul is not the product with dense(): {error:.3g} off")
    names = axes(kernel, ("embed", "mlp"))
    jax.tree.map(lambda leaf, of: sharding.spec(of, leaf.shape, sharding.make_mesh("fsdp=4, tensor=2")), kernel, names)
    table = apply.leaf(apply.form_of(spec), True, jnp.asarray(stack[0]))
    np.testing.assert_array_equal(take(table, jnp.array([3, 0])), table.dense()[jnp.array([3, 0])], say("take()"))


@contract.check("quant", quick=("int8",))
def check_model(kind, spec):
    """A model with quantized kernels gives the logits of the dequantized kernels."""
    lm = contract.build("ffn", "swiglu")
    packed = apply.quantize(contract.parameters(lm), spec)
    exact = contract.logits(lm, contract.tokens(), adapters.merge(packed))
    for form_of_lm, params in ((lm, packed), model.unroll(lm, packed)):
        logits_BTV = contract.logits(form_of_lm, contract.tokens(), params)
        error = jnp.linalg.norm(logits_BTV - exact) / jnp.linalg.norm(exact)
        assert error < 5e-3, f"{kind} {spec}: logits are {error:.3g} from those of the same numbers as arrays"


@contract.check("optimizer")
def check_optimizer(kind, spec):
    """An optimizer gives a direction per parameter; subtracting it reduces the loss."""
    optimizer, goal = build(kind, spec), {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4)}

    def loss(params):
        return sum(jnp.sum((params[name] - goal[name]) ** 2) for name in goal)

    params = jax.tree.map(jnp.zeros_like, goal)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        direction, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, jax.tree.map(lambda leaf: -0.02 * leaf, direction)), state

    first = loss(params)
    for _ in range(300):
        params, state = step(params, state)
    why = (
        f"{kind} {spec}: 300 steps of 0.02 against its direction take the loss from {first:.3g} to {loss(params):.3g}: "
    )
    assert loss(params) < 0.3 * first, why + "the learning rate and its sign come after it (optim.from_config)"


@contract.check("schedule")
def check_schedule(kind, spec):
    """A schedule gives a rate for every step, traced or not, between zero and its peak."""
    defaults = {"peak": 0.25} if "peak" in spec_parameters(_target(kind, spec)) else {}
    rate = build(kind, spec, defaults, steps=40)
    rates = jnp.array([rate(step) for step in range(40)])
    np.testing.assert_allclose(rates, jax.jit(jax.vmap(rate))(jnp.arange(40)), rtol=1e-6, atol=1e-7)
    assert jnp.isfinite(rates).all() and (rates >= 0).all() and rates.max() > 0, f"{kind} {spec}: rates are {rates}"
    assert not defaults or rates.max() <= 0.25 * (1 + 1e-6), f"{kind} {spec}: above its peak: {rates.max()}"


def _target(kind, spec):
    from efficientllm import registry

    return registry.lookup(kind, registry.parse_spec(spec)[0])


@contract.check("data", quick=("python_docs",))
def check_data(kind, spec):
    """A data source gives the same documents or pictures each time, with a held-out part. Records are conversations."""
    if modality(spec) == "images":
        check_images(kind, spec)
        return
    corpus = Corpus(spec)
    sides = [[list(Corpus(spec).texts(side)) for side in ("train", "held_out")] for _ in range(2)]
    assert sides[0] == sides[1], f"{kind} {spec}: documents() gives other documents, or another order, the second time"
    assert all(sides[0]), f"{kind} {spec}: nothing is held out, or nothing is left to train on"
    if corpus.has_records:
        messages = json.loads(sides[0][0][0])
        assert all({"role", "content"} <= set(message) for message in messages), (
            f"{kind} {spec}: data.conversation.dump"
        )


def check_images(kind, spec):
    """A source of images reads the same pictures each time, and its labels are below the number of classes."""
    first, again = ImageData(spec), ImageData(spec, tempfile.mkdtemp())
    assert first.describe() == again.describe(), f"{kind} {spec}: other pictures, or another order, the second time"
    assert len(first.indices("train")) and len(first.indices("held_out")), f"{kind} {spec}: a side has no pictures"
    assert first.pictures.labels.max() < max(first.num_classes, 1), f"{kind} {spec}: a label is none of the classes"
    (row,) = first.held_out(1, limit=1)
    assert row["images"].shape == (1, *first.image_shape), f"{kind} {spec}: is not as large as image_shape says"


@contract.check("tokenizer")
def check_tokenizer(kind, spec):
    """A tokenizer's ids are below vocab_size, decode to the text, are equal in batches, and never include eos."""
    corpus = Corpus("python_docs(max_bytes=50000)")
    tokenizer = build(kind, spec).fit(corpus)
    texts = ["def f(x):\n    return x", "a b", *list(corpus.texts("train"))[:3]]
    for text, batched in zip(texts, tokenizer.encode_batch(texts), strict=True):
        ids = list(tokenizer.encode(text))
        why = f"{kind} {spec}: of {text[:40]!r} "
        assert ids == list(batched), why + "encode and encode_batch give different ids"
        assert ids and min(ids) >= 0 and max(ids) < tokenizer.vocab_size, why + "ids lie outside the vocabulary"
        assert tokenizer.eos_id not in ids, why + "the ids hold eos, which closes a document"
        assert tokenizer.decode(ids) == text, why + f"decode(encode(text)) is {tokenizer.decode(ids)[:40]!r}"
        spelt = int(np.sum(np.asarray(tokenizer.token_bytes)[ids]))
        assert spelt == len(text.encode()), why + f"token_bytes are {spelt} of {len(text.encode())} bytes"
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size, f"{kind} {spec}: token_bytes has a number for each id"
    again = build(kind, spec).fit(corpus)
    assert again.fingerprint == tokenizer.fingerprint, f"{kind} {spec}: fingerprint is another the second time"
    for name in ("end_ids", "lead_ids", "chat", "encode_prompt"):
        assert hasattr(tokenizer, name), f"{kind} {spec} lacks {name} (data/tokenizers.py)"


@contract.check("sampler")
def check_sampler(kind, spec):
    """A sampler gives an int32 id per row that depends on the row's logits and key alone."""
    sampler = build(kind, spec)
    noise = np.random.default_rng(0)
    logits_BV = jnp.asarray(noise.standard_normal((4, 16)), jnp.float32)
    seen_BV, keys_B = jnp.zeros((4, 16 if sampler.remembers else 1), bool), jax.random.split(jax.random.key(0), 4)
    run = jax.jit(functools.partial(sampler))
    ids_B = run(logits_BV, seen_BV, keys_B)
    assert ids_B.shape == (4,) and ids_B.dtype == jnp.int32, (
        f"{kind} {spec}: gives {ids_B.dtype} {ids_B.shape}, not int32 (4,)"
    )
    assert ids_B.min() >= 0 and ids_B.max() < 16, f"{kind} {spec}: ids lie outside the vocabulary"
    np.testing.assert_array_equal(
        ids_B, run(logits_BV, seen_BV, keys_B), f"{kind} {spec}: what is drawn is in the key alone"
    )
    only = jnp.where(jnp.arange(16) == 7, 1.0, -jnp.inf) * jnp.ones((4, 1))
    np.testing.assert_array_equal(run(only, seen_BV, keys_B), 7, f"{kind} {spec}: an id of logit -inf is drawn")
    alone = [run(logits_BV[i : i + 1], seen_BV[i : i + 1], keys_B[i : i + 1])[0] for i in range(4)]
    np.testing.assert_array_equal(ids_B, alone, f"{kind} {spec}: a row's id depends on the rows beside it")


@contract.check("solver")
def check_solver(kind, spec):
    """A solver has tables of float64 and, of the right prediction of one picture at every step, gives that picture."""
    solver = build(kind, spec)
    objective = next(o for o in (build("objective", name) for name in names("objective")) if fits(solver, o))
    tables = solver.tables(objective)
    lengths = {name: (table.dtype, table.shape) for name, table in tables.items()}
    assert set(lengths.values()) == {(np.dtype("float64"), tables["level"].shape)}, f"{kind} {spec}: tables: {lengths}"
    assert (np.diff(tables["level"]) < 0).all(), f"{kind} {spec}: levels rise"
    keys = jax.random.split(jax.random.key(0), 2)
    image, noise = jax.random.uniform(keys[0], (2, 4, 4, 3), minval=-1), jax.random.normal(keys[1], (2, 4, 4, 3))

    def step(carry, row):
        x, memory = carry
        x, memory = solver.step(
            row, x, right_prediction(objective, x, image, row["level"]), memory, noise if solver.draws else None
        )
        return (x, memory), None

    rows = {name: np.float32(table) for name, table in tables.items()}
    x, _ = jax.jit(lambda carry, rows: jax.lax.scan(step, carry, rows)[0])((noise, solver.memory(noise)), rows)
    # A solver may round levels to whole numbers: 1 of 1000 of the noise is left.
    np.testing.assert_allclose(
        x, image, atol=5e-3, err_msg=f"{kind} {spec}: the right prediction gives another picture"
    )


def fits(solver, objective):
    """Whether the solver takes the objective."""
    try:
        solver.check(objective)
    except UserError:
        return False
    return True


def right_prediction(objective, x, image, level):
    """What a model that knows the picture predicts at x: the noise and the least variance, or the velocity."""
    if objective.process == "flow":
        return (x - image) / (level / 1000)
    noise = objective.to_noise(x, image, jnp.full(len(x), level, jnp.int32))
    return jnp.concatenate([noise, -jnp.ones_like(noise)], -1)


# Not checked here: those with tests of their own, those without a form of their own, and those that need a file.
EXEMPT = (
    "cross",
    "joint",
    "float32",
    "stored",
    "hf",
    "text",
    "jsonl",
    "csv",
    "parquet",
    "pairs",
    "chat",
    "image_chat",
    "chartqa",
    "images",
    "webdataset",
    "videos",
)
