"""Every config: it builds, initialises at its real size without an array, and has no key that nobody reads."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import pytest

import runs
from configs import base, dit, tune
from efficientllm import main, model, registry, sharding
from efficientllm.architecture import from_config
from efficientllm.config.plain import flatten
from efficientllm.cost import formulas
from efficientllm.embeds.picture import ImageFormat
from efficientllm.ops.attention import Context
from efficientllm.record.workdir import Workdir
from efficientllm.registry import build
from efficientllm.registry.plugins import import_plugins
from efficientllm.train import config_checks, step
from tasks import test_pictures
from tiers import slow_except

FILES = sorted(path for path in (runs.ROOT / "configs").glob("*.py") if path.stem != "__init__")
FILES += sorted((runs.ROOT / "experiments").glob("*/config.py"))


def _variants(file):
    """What may follow the file's name: `FILE` alone, or `FILE:name` for each of its variants."""
    names = getattr(importlib.import_module(f"configs.{file.stem}"), "VARIANTS", ()) if file.stem != "config" else ()
    return [str(file), *(f"{file}:{name}" for name in names)]


CONFIGS = [config for file in FILES for config in _variants(file)]


def parse(config, *overrides):
    """The config of a command line, its techniques registered."""
    parsed, _, _ = main.parse([f"--config={config}", *overrides])
    import_plugins(parsed.imports)
    return parsed


# Of each file what it is by itself, and three of its variants.
DEFAULT = [config for config in CONFIGS if ":" not in config or config.endswith((":gqa", ":mla", ":mamba"))]
BASE = {"tiny": 1_049_728, "small": 5_246_208}  # parameters of configs/base.py with a vocabulary of 2048


@pytest.mark.parametrize("name", slow_except(CONFIGS, *DEFAULT), ids=lambda name: name.removeprefix(f"{runs.ROOT}/"))
def test_config_initialises_with_the_parameters_of_its_comparison(name):
    config = parse(name)
    assert flatten(config.to_dict()).keys() == flatten(base.get_config().to_dict()).keys()
    is_of_one_size = config.model.embed != "tokens" and from_config.is_complete(config.model)  # a published model
    has_tokens = build("embed", config.model.embed).reads != "images"
    inputs = 2048 if has_tokens else None if is_of_one_size else ImageFormat(32, 4, 62)
    lm = from_config.from_config(config.model, inputs)
    state = jax.eval_shape(step.init_state(lm, config.train, config.seed, config.train.length))
    counts = {"tiny": formulas.count_parameters(lm, state.params)["total"]}
    if is_of_one_size:
        return
    config.model.size = "small"
    lm = from_config.from_config(config.model, inputs)
    counts["small"] = formulas.count_parameters(lm, model.abstract_params(lm))["total"]
    for size, count in counts.items() if config.model.embed == "tokens" else ():
        assert not config.model.parameters_of or abs(count / BASE[size] - 1) <= 0.02, f"{size}: {count:,}"


@pytest.mark.parametrize("method", tune.ADAPTERS)
def test_methods_of_tuning_differ_by_the_method_alone(method):
    """One batch, one count of tokens and one evaluation for all, with the data of the study and without."""
    for name in (f"tune.py:{method}", f"tune_study.py:{method}", f"tune_study.py:{method}+medical"):
        config, plain = (flatten(parse(f"{runs.ROOT}/configs/{preset}").to_dict()) for preset in (name, _as_lora(name)))
        assert {key for key in config if config[key] != plain[key]} <= {"name", "adapter", "quant", "train.schedule"}
        registry.build("adapter", config["adapter"])
        assert registry.build("data", config["data"]).records
    assert "medical-o1-reasoning-SFT" in config["data"]


def _as_lora(name):
    file, _, variant = name.partition(":")
    return f"{file}:lora{''.join(variant.partition('+')[1:])}"


# Qwen2.5's published totals (arXiv:2412.15115), embeddings included, to the unit as its checkpoints have them.
STUDY = {"0.5b": 494_032_768, "1.5b": 1_543_714_304, "3b": 3_085_938_688}
UNTIED = {"7b": 7_615_616_512, "14b": 14_770_033_664, "32b": 32_763_876_352, "72b": 72_706_203_648}
STUDY |= UNTIED


@pytest.mark.parametrize("size", STUDY)
def test_study_sizes_have_the_published_parameter_counts(size):
    config = base.get_config().model
    config.size, config.tied = size, size not in UNTIED
    lm = from_config.from_config(config)
    tokens = jnp.zeros((1, 8), jnp.int32)
    boxed = jax.eval_shape(lambda: lm.init(jax.random.key(0), tokens, Context.packed(tokens)))["params"]
    assert formulas.count_parameters(lm, boxed)["total"] == STUDY[size]


def test_moe_counts_active_parameters_by_closed_formula():
    config = base.get_config().model
    config.ffn = "moe(num_experts=8, top_k=2)"
    lm = from_config.from_config(config, 512)
    tokens = jnp.zeros((1, 8), jnp.int32)
    boxed = jax.eval_shape(lambda: lm.init(jax.random.key(0), tokens, Context.packed(tokens)))["params"]
    D, N, expert = 128, 4, 3 * 128 * 384
    rest = 512 * D + N * (2 * D + D * (128 + 64 + 64 + 128) + D * 8) + D
    assert formulas.count_parameters(lm, boxed) == {"total": rest + N * 8 * expert, "active": rest + N * 2 * expert}


class Watched:
    """A config that remembers which keys were read."""

    def __init__(self, config, read, prefix=""):
        object.__setattr__(self, "_parts", (config, read, prefix))

    def __getattr__(self, key):
        config, read, prefix = self._parts
        value = config[key] if key in config else getattr(config, key)
        if key not in config:
            return value
        path = f"{prefix}.{key}".strip(".")
        if isinstance(value, ml_collections.ConfigDict):
            return Watched(value, read, path)
        read.add(path)
        return value

    __getitem__ = __getattr__


@pytest.mark.slow
def test_every_key_is_read_by_somebody(tmp_path):
    folder = runs.corpus(tmp_path / "texts")
    config, _, _ = main.parse(runs.arguments(folder, tmp_path / "run", train__steps=2))
    read = {"imports", "task", "compile_cache"}  # by run.run, before the task
    read |= {"plan.images"}  # from the plan's own copy of the config: tests/plan/test_vision_plans.py
    import_plugins(config.imports)
    config.infer.repeats, config.infer.max_new_tokens, config.infer.prompt_length = 1, 2, 4
    for name in ("pretrain", "infer", "plan"):
        task = registry.lookup("task", name)
        assert task.execute(Watched(config, read), Workdir(config, tmp_path / name)) == 0
    pictures, _, _ = main.parse(test_pictures.arguments(tmp_path / "pictures", train__steps=2))
    task = registry.lookup("task", "pretrain")
    assert task.execute(Watched(pictures, read), Workdir(pictures, tmp_path / "pictures")) == 0
    assert flatten(config.to_dict()).keys() - read == set()


def test_the_readme_config_is_the_study_s_mixture_in_small():
    config, _, _ = main.parse([f"--config={pathlib.Path(runs.ROOT, 'configs/moe.py')}"])
    ffn = registry.parse_spec(config.model.ffn)[1]
    assert (ffn["num_experts"], ffn["top_k"], ffn["load_balance"]) == (8, 2, 0.01)
    config_checks.check_train(config.train, sharding.make_mesh("data=1", jax.devices()[:1]))


def test_no_two_variants_of_the_small_diffusion_transformer_are_one_model():
    """As gqa was with a KV head for each query head."""
    shapes = {}
    for name in dit.VARIANTS:
        lm = from_config.from_config(dit.get_config(name).model, ImageFormat(32, 1, 62))
        shapes[name] = str(jax.tree.map(lambda leaf: leaf.shape, model.abstract_params(lm)))
    assert len(set(shapes.values())) == len(shapes)
