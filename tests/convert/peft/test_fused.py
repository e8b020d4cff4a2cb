"""Adapters of families that hold several of our kernels in one tensor, in peft's folders, both directions."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import base
from convert import peers
from convert.peft.test_peft import OPTIONS, moved
from efficientllm import convert, model
from efficientllm.convert import peft as folder
from efficientllm.errors import UserError
from efficientllm.registry import build
from efficientllm.train import step
from efficientllm.weights import box_as
from tiers import slow_case, slow_except

peft = pytest.importorskip("peft")

# family -> (what peft adapts, the same in our paths)
FAMILIES = {
    "phi3": (r".*(qkv_proj|o_proj|gate_up_proj|down_proj)", ".*"),
    "gpt-neox": (r".*(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)", ".*"),
    "mamba": (r".*(in_proj|x_proj)", "mixer/(x|gate|select)/"),
    "mamba2": (r".*in_proj", "mixer/(gate|x|bc|step)/"),
}
CASES = [(family, name) for family in FAMILIES for name in OPTIONS]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """`family -> Source`, each made once. The largest singular values stand apart from the rest, as PiSSA's four do in
    `test_peft`."""
    made, where = {}, tmp_path_factory.mktemp("fused")

    def get(family):
        if family not in made:
            plain = peers.reference(family)
            with peers.torch.no_grad():
                for name, tensor in plain.named_parameters():
                    if tensor.ndim == 2 and "layers" in name and "_log" not in name:
                        u, s, vt = peers.torch.linalg.svd(tensor.double(), full_matrices=False)
                        s[:4] += s[0].clone()
                        tensor.copy_(0.5 * (u * s) @ vt)
            plain.save_pretrained(where / family)
            made[family] = convert.open_source(where / family)
        return made[family]

    return get


def tuned_by_us(source, spec):
    """`(lm, parameters)` around the checkpoint, what learns moved from its initial value."""
    lm, method = source.lm(), build("adapter", spec)
    boxed = model.abstract_params(lm)
    boxed_params = box_as(boxed, source.load(peers.abstract(lm)))
    state = nn.unbox(step.create(lm, base.get_config().train, method, 0, boxed, boxed_params))
    noise = np.random.default_rng(0)
    learnt = jax.tree.map(lambda leaf: leaf + 0.05 * noise.standard_normal(leaf.shape, np.float32), state.params)
    return lm, step.join(learnt, state.frozen)


def loaded_by_peft(source, where):
    plain = peers.transformers.AutoModelForCausalLM.from_pretrained(
        source.path, attn_implementation="eager", experts_implementation="eager"
    )
    return peft.PeftModel.from_pretrained(plain, where).eval()


@pytest.mark.parametrize("family, name", slow_except(CASES, ("phi3", "dora"), ("gpt-neox", "pissa")))
def test_we_read_what_peft_writes(sources, family, name, tmp_path):
    source, ids = sources(family), peers.tokens()
    options = {"init_lora_weights": "gaussian", "target_modules": FAMILIES[family][0]} | OPTIONS[name]
    tuned = moved(source, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options))
    tuned.save_pretrained(tmp_path / "adapter")
    lm = source.lm()
    expected = peers.their_logits(tuned, ids)
    params = folder.around(source, lm, source.load(peers.abstract(lm)), tmp_path / "adapter")
    peers.close(peers.our_logits(lm, params, ids), expected, 1e-5)

    convert.merge_into(source, tmp_path / "adapter", tmp_path / "merged")
    merged = peers.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    peers.close(peers.their_logits(merged.eval(), ids), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family, name", CASES)
def test_peft_reads_what_we_write(sources, family, name, tmp_path):
    check_written(sources(family), f"{name}(rank=4, alpha=6, target='{FAMILIES[family][1]}')", name, tmp_path)


def check_written(source, spec, name, where):
    ids = peers.tokens(1)
    lm, params = tuned_by_us(source, spec)
    expected = peers.our_logits(lm, params, ids)
    folder.write(lm, spec, params, where / "adapter", source)
    peers.close(peers.their_logits(loaded_by_peft(source, where / "adapter"), ids), expected, 1e-5)
    back = folder.around(source, lm, source.load(peers.abstract(lm)), where / "adapter")
    peers.close(peers.our_logits(lm, back, ids), expected, 1e-5)


@pytest.mark.parametrize("name", ["dora", slow_case("rslora")])
def test_one_kernel_of_a_tensor_may_be_adapted(sources, name, tmp_path):
    check_written(sources("phi3"), f"{name}(rank=4, alpha=6, target='mixer/(q|v|o)/')", name, tmp_path)


EXPERTS = [("mixtral", ".*"), ("qwen3-moe", "mixer/|experts/"), ("deepseek-v3", "mixer/|experts/")]


# peft looks for its own patterns of experts among modules, and experts are none.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["rslora", "pissa"])
@pytest.mark.parametrize("family, target", EXPERTS)
def test_peft_reads_what_we_write_of_experts(sources, family, target, name, tmp_path):
    check_written(sources(family), f"{name}(rank=4, alpha=6, dropout=0.1, target='{target}')", name, tmp_path)


@pytest.mark.parametrize(
    "family, spec, message",
    [
        ("mamba", "lora(rank=4, target='mixer/')", "mixer.out_proj: PEFT cannot adapt it"),
        ("mamba", "lora(rank=4, target='mixer/step/')", "mixer.dt_proj: transformers reads its weight without"),
        ("mixtral", "dora(rank=4, target='experts')", "peft has no dora of experts"),
        ("mixtral", "lora(rank=4, target='experts/(gate|down)')", "peft adapts w1 and w3 of experts together"),
        slow_case(
            "deepseek-v3", "lora(rank=4)", "mlp.down_proj: peft takes an adapter of that name for one of the experts'"
        ),
    ],
)
def test_what_peft_refuses_is_not_written(sources, family, spec, message, tmp_path):
    source = sources(family)
    lm, params = tuned_by_us(source, spec)
    with pytest.raises(UserError, match=message) as error:
        folder.write(lm, spec, params, tmp_path / "adapter", source)
    assert "\n" not in str(error.value) and not (tmp_path / "adapter").exists()
