"""Our tuning methods against peft's, from identical factors: logits, one optimiser step, merged weights, folders."""

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import optax
import pytest

from configs import base
from convert import peers
from efficientllm import convert, model
from efficientllm.adapters import full_delta
from efficientllm.adapters.base import KERNEL, attach, merge, split
from efficientllm.convert import peft as folder
from efficientllm.optim import from_config
from efficientllm.registry import build
from efficientllm.train import step
from efficientllm.weights import box_as
from tiers import slow_except

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

OPTIONS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
RATE = 0.1


def theirs(source, name, **changes):
    """peft's model with random factors."""
    options = {"init_lora_weights": "gaussian", "target_modules": "all-linear"} | OPTIONS[name] | changes
    return moved(source, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options))


def moved(source, config):
    plain = peers.transformers.AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager")
    torch.manual_seed(0)
    tuned = peft.get_peft_model(plain, config).eval()
    with torch.no_grad():
        for tensor in tuned.parameters():
            if tensor.requires_grad:
                tensor.add_(0.05 * torch.randn(tensor.shape))
    return tuned


def ours(source, name, where):
    lm = source.lm()
    return lm, folder.around(source, lm, source.load(peers.abstract(lm)), where)


@pytest.mark.parametrize("name", slow_except(OPTIONS, "dora"))
def test_logits_a_step_and_merged_weights_are_pefts(source, name, tmp_path):
    tuned, ids = theirs(source, name), peers.tokens()
    tuned.save_pretrained(tmp_path / "adapter")
    lm, params = ours(source, name, tmp_path / "adapter")
    peers.close(peers.our_logits(lm, params, ids), peers.their_logits(tuned, ids), 1e-5)

    method = build("adapter", folder.read_spec(tmp_path / "adapter"))
    labels = torch.tensor(ids).long()
    tuned(labels, labels=labels).loss.backward()
    with torch.no_grad():
        for tensor in tuned.parameters():
            if tensor.grad is not None:
                tensor.sub_(RATE * tensor.grad)
    learnt, frozen = split(method, lm, params)
    learnt = jax.tree.map(lambda leaf, grad: leaf - RATE * grad, learnt, gradients(lm, learnt, frozen, ids))
    stepped = step.join(learnt, frozen)
    peers.close(peers.our_logits(lm, stepped, ids), peers.their_logits(tuned, ids), 1e-5)

    same_kernels(lm, source, merge(stepped), tuned.merge_and_unload())


def kernels(lm, source, params):
    """`(name on disk, our path, what is there, position in its leading axes)` of every kernel of the layers."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for path, bound in source.bind(lm).items():
        if KERNEL.search(path):
            yield from ((name, path, flat[path], position) for position, name in bound.tensors())


def same_kernels(lm, source, params, merged):
    tensors = dict(merged.named_parameters())
    our_kernels = list(kernels(lm, source, params))
    assert len(our_kernels) == 7 * peers.LAYERS
    for name, _, kernel, position in our_kernels:
        np.testing.assert_allclose(kernel[position], tensors[name].detach().numpy().T, atol=1e-5, err_msg=name)


def gradients(lm, learnt, frozen, ids):
    rows, length = ids.shape[0], ids.shape[1] - 1
    batch = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segments": np.ones((rows, length), np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "weights": np.ones((rows, length), np.float32),
    }
    return jax.jit(lambda a: step.gradients(lm, a, batch, 1, frozen)[0])(learnt)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_peft_loads_what_we_write(source, name, tmp_path):
    spec, ids = f"{name}(rank=4, alpha=6)", peers.tokens(1)
    lm, method = source.lm(), build("adapter", f"{name}(rank=4, alpha=6)")
    boxed = model.abstract_params(lm)
    boxed_params = box_as(boxed, source.load(peers.abstract(lm)))
    state = nn.unbox(step.create(lm, base.get_config().train, method, 0, boxed, boxed_params))
    noise = np.random.default_rng(0)
    learnt = jax.tree.map(lambda leaf: leaf + 0.05 * noise.standard_normal(leaf.shape, np.float32), state.params)
    params = step.join(learnt, state.frozen)
    folder.write(lm, spec, params, tmp_path / "adapter", source)
    plain = peers.transformers.AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    peers.close(peers.our_logits(lm, params, ids), peers.their_logits(loaded, ids), 1e-5)

    convert.merge_into(source, tmp_path / "adapter", tmp_path / "merged")
    merged = convert.open_source(tmp_path / "merged")
    our_logits = peers.our_logits(lm, merged.load(peers.abstract(lm)), ids)
    peers.close(our_logits, peers.their_logits(loaded, ids), 1e-5)


# Of methods that peft has no LoRA folder of: its config, our spec, and our arrays' names there.
FURTHER = {
    "lora_plus": (
        lambda **where: peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="gaussian", **where),
        "lora_plus(rank=4, alpha=6, ratio=8)",
        {"a": "lora_A.default.weight", "b": "lora_B.default.weight"},
    ),
    "loha": (
        lambda **where: peft.LoHaConfig(r=3, alpha=5, **where),
        "loha(rank=3, alpha=5)",
        {"a1": "hada_w1_b.default", "b1": "hada_w1_a.default", "a2": "hada_w2_b.default", "b2": "hada_w2_a.default"},
    ),
    "lokr": (
        lambda **where: peft.LoKrConfig(r=3, alpha=5, **where),
        "lokr(rank=3, alpha=5)",
        {"c": "lokr_w1.default", "a": "lokr_w2_b.default", "b": "lokr_w2_a.default"},
    ),
    "glora": (
        lambda **where: peft.GloraConfig(r=3, **where),
        "glora(rank=3)",
        {
            "a1": "glora_A.default.Xu",
            "b1": "glora_A.default.Xd",
            "a2": "glora_B.default.Xu",
            "b2": "glora_B.default.Xd",
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FURTHER)
def test_methods_without_a_lora_folder_are_pefts(source, name):
    make, spec, suffixes = FURTHER[name]
    if name == "glora" and not hasattr(peft, "GloraConfig"):
        pytest.skip("this peft has no GLoRA")
    tuned, ids = moved(source, make(target_modules=r".*_proj")), peers.tokens()
    lm, method = source.lm(), build("adapter", spec)
    params = with_factors(lm, source, method, dict(tuned.named_parameters()), suffixes)
    peers.close(peers.our_logits(lm, params, ids), peers.their_logits(tuned, ids), 1e-5)

    labels = torch.tensor(ids).long()
    if name == "lora_plus":
        from peft.optimizers import create_loraplus_optimizer

        step_of = create_loraplus_optimizer(tuned, torch.optim.SGD, lr=RATE, loraplus_lr_ratio=8)
    else:
        step_of = torch.optim.SGD([tensor for tensor in tuned.parameters() if tensor.requires_grad], lr=RATE)
    tuned(labels, labels=labels).loss.backward()
    step_of.step()
    train = base.get_config().train
    train.optimizer, train.clip, train.schedule = "sgd(momentum=0.0)", 0.0, f"constant(peak={RATE})"
    learnt, frozen = split(method, lm, params)
    optimizer = from_config.optimizer(train, learnt, method.rates)
    updates, _ = optimizer.update(gradients(lm, learnt, frozen, ids), optimizer.init(learnt), learnt)
    stepped = step.join(optax.apply_updates(learnt, updates), frozen)
    peers.close(peers.our_logits(lm, stepped, ids), peers.their_logits(tuned, ids), 1e-5)
    same_kernels(lm, source, merge(stepped), tuned.merge_and_unload())


def with_factors(lm, source, method, tensors, suffixes):
    """A checkpoint's parameters with the method's leaves around them, holding peft's factors."""
    boxed = model.abstract_params(lm)
    boxed_params = box_as(boxed, source.load(peers.abstract(lm)))
    params = nn.unbox(attach(method, boxed, boxed_params, jax.random.key(0)))
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for name, path, leaf, position in kernels(lm, source, params):
        module = folder.PREFIX + name.removesuffix(".weight")
        factors = {ours: tensors[f"{module}.{suffix}"].detach().numpy().T for ours, suffix in suffixes.items()}
        put = {ours: getattr(flat[path], ours).at[position].set(value) for ours, value in factors.items()}
        flat[path] = flat[path].replace(**put)
        assert all(getattr(leaf, ours)[position].shape == value.shape for ours, value in factors.items())
    return flax.traverse_util.unflatten_dict(flat, sep="/")


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_changes_of_the_kernel_are_pefts(name):
    layer = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False))
    kinds = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}
    tuned = peft.get_peft_model(layer, kinds[name](r=3, alpha=5, target_modules=["0"]))
    adapter = tuned.base_model.model[0]
    torch.manual_seed(0)
    with torch.no_grad():
        for path, tensor in tuned.named_parameters():
            if name in path or "hada" in path:
                tensor.normal_()
    expected = adapter.get_delta_weight("default").detach().numpy().T

    def get(key):
        return getattr(adapter, key)["default"].detach().numpy()

    base_kernel = np.zeros((24, 40), np.float32)
    if name == "loha":
        a1, b1, a2, b2 = (get(f"hada_w{i}_{factor}").T for i in (1, 2) for factor in ("b", "a"))
        leaf = full_delta.LoHa(base_kernel, a1, b1, a2, b2, scale=5 / 3)
    else:
        leaf = full_delta.LoKr(base_kernel, get("lokr_w1").T, get("lokr_w2_b").T, get("lokr_w2_a").T, scale=5 / 3)
    np.testing.assert_allclose(leaf.delta(), expected, rtol=1e-5, atol=1e-6)
