"""Our tuning methods against peft's, from identical factors: logits, one optimiser step, merged weights, folders."""

import jax
import numpy as np
import pytest
from convert import peers

from configs import base
from efficientllm import convert, model
from efficientllm.adapters import folder, products
from efficientllm.adapters.base import merge, split
from efficientllm.errors import UserError
from efficientllm.registry import build
from efficientllm.train import step

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

OPTIONS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
RATE = 0.1


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    where = tmp_path_factory.mktemp("base") / "model"
    peers.reference("llama").save_pretrained(where)
    return convert.open_source(where)


def theirs(source, name):
    """peft's model with random factors."""
    plain = peers.transformers.AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager")
    torch.manual_seed(0)
    options = {"init_lora_weights": "gaussian"} | OPTIONS[name]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    tuned = peft.get_peft_model(plain, config).eval()
    with torch.no_grad():
        for path, tensor in tuned.named_parameters():
            if "lora_" in path:
                tensor.add_(0.05 * torch.randn(tensor.shape))
    return tuned


def ours(source, name, where):
    lm = source.lm()
    return lm, folder.around(source, lm, source.load(peers.abstract(lm)), where)


SOME = [pytest.param(name, marks=[pytest.mark.slow] * (name != "dora")) for name in OPTIONS]


@pytest.mark.parametrize("name", SOME)
def test_logits_a_step_and_merged_weights_are_pefts(source, name, tmp_path):
    tuned, ids = theirs(source, name), peers.tokens()
    tuned.save_pretrained(tmp_path / "adapter")
    lm, params = ours(source, name, tmp_path / "adapter")
    # Both take the kernel apart for PiSSA, each by its own float32 singular values.
    tolerance = 3e-5 if name == "pissa" else 1e-5
    peers.close(peers.our_logits(lm, params, ids), peers.their_logits(tuned, ids), tolerance)

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
    peers.close(peers.our_logits(lm, stepped, ids), peers.their_logits(tuned, ids), 2e-5)

    merged = tuned.merge_and_unload()
    expected = dict(merged.named_parameters())["model.layers.1.mlp.down_proj.weight"].detach().numpy().T
    found = merge(stepped)["groups"]["block_0"]["ffn"]["down"]["kernel"][1]
    np.testing.assert_allclose(found, expected, atol=1e-5)


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


@pytest.mark.parametrize("name", SOME)
def test_peft_loads_what_we_write(source, name, tmp_path):
    spec, ids = f"{name}(rank=4, alpha=6)", peers.tokens(1)
    lm, method = source.lm(), build("adapter", f"{name}(rank=4, alpha=6)")
    boxed = model.abstract_params(lm)
    held = jax.tree.map(lambda a, b: a.replace_boxed(b), boxed, source.load(peers.abstract(lm)), is_leaf=folder.is_box)
    state = folder.nn.unbox(step.create(lm, base.get_config().train, method, 0, boxed, held))
    noise = np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + 0.05 * noise.standard_normal(leaf.shape, np.float32), state.params)
    params = step.join(moved, state.frozen)
    folder.write(lm, spec, params, tmp_path / "adapter", source)
    plain = peers.transformers.AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    peers.close(peers.our_logits(lm, params, ids), peers.their_logits(loaded, ids), 1e-5)

    folder.merge_into(source, tmp_path / "adapter", tmp_path / "merged")
    merged = convert.open_source(tmp_path / "merged")
    found = peers.our_logits(lm, merged.load(peers.abstract(lm)), ids)
    peers.close(found, peers.their_logits(loaded, ids), 1e-5)


def test_what_is_no_adapter_of_this_model_is_refused(source, tmp_path):
    theirs(source, "lora").save_pretrained(tmp_path / "adapter")
    lm = source.lm()
    params = source.load(peers.abstract(lm))
    config = (tmp_path / "adapter" / folder.CONFIG).read_text()
    for change, message in ((('"r": 4', '"r": 5'), "another model or rank"), (('"none"', '"all"'), "bias = 'all'")):
        (tmp_path / "adapter" / folder.CONFIG).write_text(config.replace(*change))
        with pytest.raises(UserError, match=message):
            folder.around(source, lm, params, tmp_path / "adapter")
    (tmp_path / "adapter" / folder.TENSORS).unlink()
    (tmp_path / "adapter" / folder.CONFIG).write_text(config)
    with pytest.raises(UserError, match="is missing: no folder of an adapter"):
        folder.around(source, lm, source.load(peers.abstract(lm)), tmp_path / "adapter")


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
    get = lambda key: getattr(adapter, key)["default"].detach().numpy()  # noqa: E731
    base_kernel = np.zeros((24, 40), np.float32)
    if name == "loha":
        a1, b1, a2, b2 = (get(f"hada_w{i}_{part}").T for i in (1, 2) for part in ("b", "a"))
        leaf = products.LoHa(base_kernel, a1, b1, a2, b2, scale=5 / 3)
    else:
        leaf = products.LoKr(base_kernel, get("lokr_w1").T, get("lokr_w2_b").T, get("lokr_w2_a").T, scale=5 / 3)
    np.testing.assert_allclose(leaf.delta(), expected, rtol=1e-5, atol=1e-6)
