"""Full tuning, freezing and QLoRA against torch's own step on a model of transformers, from one checkpoint."""

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest

from configs import base
from convert import peers
from convert.peft.test_peft import gradients
from efficientllm import convert, model
from efficientllm.convert import peft as folder
from efficientllm.optim import from_config
from efficientllm.quant.base import Rows
from efficientllm.registry import build
from efficientllm.train import step
from efficientllm.weights import box_as
from tiers import slow_case

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
RATE, DECAY, EPS = 0.01, 0.1, 1e-3  # of AdamW; a step of signs, as a small epsilon makes it, compares nothing


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    where = tmp_path_factory.mktemp("base") / "model"
    peers.reference("llama").save_pretrained(where)
    return convert.open_source(where)


def train():
    config = base.get_config().train
    config.optimizer, config.clip = f"adamw(eps={EPS})", 0.0
    config.schedule, config.decay = f"constant(peak={RATE})", ((".*", DECAY),)
    return config


def start(source, spec, form="float32"):
    """`(lm, TrainState)` around the checkpoint."""
    method = build("adapter", spec)
    lm = source.lm(scan=not method.unrolled)
    boxed = model.abstract_params(lm)
    boxed_params = box_as(boxed, source.load(peers.abstract(lm)))
    return lm, nn.unbox(step.create(lm, train(), method, 0, boxed, boxed_params, form))


def ours_after(lm, state, ids):
    """All parameters after one step."""
    grads = gradients(lm, state.params, state.frozen, ids)
    optimizer = from_config.optimizer(train(), state.params)
    updates, _ = optimizer.update(grads, state.opt_state, state.params)
    return step.join(step.optax.apply_updates(state.params, updates), state.frozen)


def step_theirs(theirs, ids):
    """One step of torch on what learns there."""
    labels = torch.tensor(ids).long()
    optimizer = torch.optim.AdamW(filter(_learns, theirs.parameters()), lr=RATE, eps=EPS, weight_decay=DECAY)
    theirs(labels, labels=labels).loss.backward()
    optimizer.step()


def _learns(tensor):
    return tensor.requires_grad


def load(source):
    return peers.transformers.AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager").eval()


@pytest.mark.slow
@pytest.mark.parametrize("spec", [slow_case("full()"), "freeze(last=1)", slow_case("freeze(first=1)")])
def test_a_step_of_what_makes_no_leaf_is_torchs(source, spec):
    theirs, ids = load(source), peers.tokens()
    lm, state = start(source, spec)
    peers.close(peers.our_logits(lm, state.all_params, ids), peers.their_logits(theirs, ids), 1e-5)
    chosen = {"full()": "", "freeze(last=1)": "model.layers.1.", "freeze(first=1)": "model.layers.0."}[spec]
    before = {name: tensor.detach().clone() for name, tensor in theirs.named_parameters()}
    for name, tensor in theirs.named_parameters():
        tensor.requires_grad_(name.startswith(chosen))
    step_theirs(theirs, ids)
    our_params = ours_after(lm, state, ids)
    peers.close(peers.our_logits(lm, our_params, ids), peers.their_logits(theirs, ids), 1e-5)

    flat, after = flax.traverse_util.flatten_dict(our_params, sep="/"), dict(theirs.named_parameters())
    for path, bound in source.bind(lm).items():
        for position, name in bound.tensors():
            there, was = (
                bound.layout.take(tensors[name].detach().numpy(), 0, bound.shapes, None) for tensors in (after, before)
            )
            np.testing.assert_allclose(flat[path][position], there, atol=1e-5, err_msg=name)
            if not name.startswith(chosen):
                np.testing.assert_array_equal(flat[path][position], was, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["lora(rank=4, alpha=6)", slow_case("dora(rank=4, alpha=6)")])
def test_qlora_is_pefts_around_the_weights_that_are_rounded(source, spec, tmp_path):
    """The frozen kernels of peft's model hold what our four bits stand for."""
    ids = peers.tokens()
    lm, state = start(source, spec, "nf4(block=32)")
    noise = np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + 0.05 * noise.standard_normal(leaf.shape, np.float32), state.params)
    state = state.replace(params=moved)
    folder.write(lm, spec, state.all_params, tmp_path / "adapter", source)

    def rounded(leaf):
        return isinstance(leaf, Rows)

    dense = jax.tree.map(lambda leaf: leaf.dense() if rounded(leaf) else leaf, bare(state.all_params), is_leaf=rounded)
    convert.export(lm, dense, tmp_path / "rounded", source)
    plain = load(convert.open_source(tmp_path / "rounded"))
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True).eval()
    peers.close(peers.our_logits(lm, state.all_params, ids), peers.their_logits(theirs, ids), 1e-5)
    assert np.abs(peers.their_logits(theirs, ids) - peers.their_logits(load(source), ids)).max() > 1e-2
    step_theirs(theirs, ids)
    our_params = ours_after(lm, state, ids)
    peers.close(peers.our_logits(lm, our_params, ids), peers.their_logits(theirs, ids), 1e-5)


def bare(params):
    """The kernels that adapters are around."""

    def is_adapter(node):
        return hasattr(node, "a")

    return jax.tree.map(lambda node: node.base if is_adapter(node) else node, params, is_leaf=is_adapter)
