"""Initial values of adapters: those of peft, by the distribution of each factor."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from efficientllm.registry import build
from efficientllm.weights import box

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.quick

WIDTH_IN, WIDTH_OUT = 768, 1536  # 24 x 32 and 32 x 48
CASES = {
    "lora(rank=16)": (
        lambda: peft.LoraConfig(r=16, target_modules=["layer"]),
        {"a": "lora_A.default.weight", "b": "lora_B.default.weight"},
    ),
    "loha(rank=16)": (
        lambda: peft.LoHaConfig(r=16, target_modules=["layer"]),
        {
            "a1": "hada_w1_b.default",
            "b1": "hada_w1_a.default",
            "a2": "hada_w2_b.default",
            "b2": "hada_w2_a.default",
        },
    ),
    "lokr(rank=23)": (
        lambda: peft.LoKrConfig(r=23, target_modules=["layer"]),
        {"c": "lokr_w1.default", "a": "lokr_w2_b.default", "b": "lokr_w2_a.default"},
    ),
    "lokr(rank=24)": (
        lambda: peft.LoKrConfig(r=24, target_modules=["layer"]),
        {"c": "lokr_w1.default", "block": "lokr_w2.default"},
    ),
    "glora(rank=16)": (
        lambda: peft.GloraConfig(r=16, target_modules=["layer"]),
        {
            "a1": "glora_A.default.Xu",
            "b1": "glora_A.default.Xd",
            "a2": "glora_B.default.Xu",
            "b2": "glora_B.default.Xd",
            "c_a": "glora_C.default.Xd",
            "c_b": "glora_C.default.Xu",
            "d": "glora_D.default.X",
            "e": "glora_E.default.X",
        },
    ),
}


class Layers(torch.nn.Module):
    def __init__(self, count):
        super().__init__()
        for i in range(count):
            self.add_module(f"{i}", torch.nn.ModuleDict({"layer": torch.nn.Linear(WIDTH_IN, WIDTH_OUT)}))


@pytest.mark.parametrize("spec", CASES)
def test_of_each_factor(spec):
    config, names = CASES[spec]
    torch.manual_seed(0)
    count = 40  # layers, for factors of a few numbers
    theirs = peft.get_peft_model(Layers(count), config())
    state = dict(theirs.named_parameters())
    kernel = box(np.zeros((count, WIDTH_IN, WIDTH_OUT), np.float32), (None, "embed", "mlp"))
    leaf = nn.unbox(build("adapter", spec).wrap_biased(kernel, kernel.names, jax.random.key(0)))
    trainable = [name for name, tensor in state.items() if tensor.requires_grad]
    assert len(trainable) == len(names) * count
    for field, name in names.items():
        actual = np.asarray(getattr(leaf, field))
        arrays = [state[f"base_model.model.{i}.layer.{name}"].detach().numpy() for i in range(count)]
        expected = np.stack(arrays)
        shape = expected.shape[1:] if field in ("c_a", "c_b") else expected.shape[1:][::-1]  # C is a column of inputs
        assert actual.shape[1:] == shape, field
        bound = np.abs(expected).max()
        if not bound:
            assert not actual.any(), field
            continue
        # Uniform in both: the largest of n values is 1 / n below the bound; a standard deviation is 0.45 / n^.5 off.
        n = actual.size
        np.testing.assert_allclose(np.abs(actual).max(), bound, rtol=20 / n, err_msg=field)
        np.testing.assert_allclose(actual.std(), bound / 3**0.5, rtol=4 * 0.45 / n**0.5 + 20 / n, err_msg=field)
        assert abs(actual.mean()) < 5 * bound / 3**0.5 / n**0.5
