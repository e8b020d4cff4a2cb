"""The config's schema: what a key, a value and a spec may be, in files, flags and code alike."""

import inspect
import math
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict, config_dict

import runs
from efficientllm import base_config, main, registry
from efficientllm.config import key_ranges, schema, value_rules
from efficientllm.config.plain import flatten
from efficientllm.errors import UserError
from efficientllm.ffns.dense import GELUS
from efficientllm.registry import catalogue, ranges
from efficientllm.sharding import AXES
from efficientllm.tasks import run

pytestmark = pytest.mark.quick

BASE = f"--config={runs.ROOT}/configs/base.py"
LONG = 99_999_999_999
BAD_VALUES = [
    ("train.clip", -1.0, "must be at least 0 and finite (0 does not clip)"),
    ("train.clip", math.inf, "finite"),
    ("train.clip", 1e39, "finite"),  # as a float32
    ("sample.temperature", math.nan, "finite"),
    ("sample.temperature", -1.0, "at least 0"),
    ("seed", -1, "at least 0, at most 4,294,967,295 and whole"),
    ("seed", 2**32, "at most 4,294,967,295"),
    ("eval.every", -1, "at least 0"),
    ("eval.batches", -1, "at least 0"),
    ("checkpoint.every", -1, "at least 0"),
    ("checkpoint.keep", -1, "at least 0"),
    ("sample.tokens", -1, "at least 0"),
    ("metrics.interval_s", 0.0, "at least 0.001"),
    ("metrics.interval_s", 1e10, "at most 3,600"),
    ("train.steps", 0, "at least 1"),
    ("train.steps", 10**20, "at most 2,147,483,647"),
    ("train.accumulate", 3, "must divide config.train.batch_size = 8"),
    ("train.decay", ((".*", math.nan),), "finite"),
    ("train.decay", ((".*", -0.1),), "at least 0"),
    ("train.decay", ((".*", "x"),), "finite"),
    ("train.decay", (("(", 0.1),), "is no regex"),
    ("train.rates", ((".*", 1.0, 2),), "pairs of (regex, number)"),
    ("train.rates", ("x",), "pairs of (regex, number)"),
    ("infer.rules", (("x", "int5"),), "did you mean 'int8'?"),
    ("infer.stop", ("",), "holds an empty text"),
    ("infer.prompts", (3,), "a tuple of texts, not of int"),
    ("infer.prompts", (None,), "a tuple of texts, not of NoneType"),
    ("model.pattern", (1,), "a tuple of texts, not of int"),
    ("model.pattern", ("gqa | moee",), "did you mean 'moe'?"),
    ("model.size", "tiny(dim=0)", "dim = 0: must be at least 1"),
    ("model.size", "tiny(hidden=-1)", "hidden = -1"),
    ("model.size", "tiny(num_layers=1000000)", "at most 10,000"),
    ("model.size", "tiny(norm_eps=1e-60)", "above 0"),
    ("model.size", "custom(num_layers=2)", "needs a value for dim"),
    ("model.mixer", "window", "needs a value for window"),
    ("model.mixer", "gqa(position='rope(base=-1)')", "base = -1"),
    ("model.mixer", "gqa(norm='rmsnom')", "did you mean 'rmsnorm'?"),
    ("model.mixer", "gqa(attention_kernel='xl')", "did you mean 'xla'?"),
    ("model.position", "rope(scaling='yarn(factor=0.0, original_length=8)')", "above 0"),
    ("model.position", f"learned(max_length={LONG})", "at most 16,777,216"),
    ("model.ffn", "moe(num_experts=4, top_k=2, dispatch='x')", "none of dropless, capacity"),
    ("model.parameters_of", "gqaa", "did you mean 'gqa'?"),
    ("model.kv_cache", "int7", "did you mean 'int8'?"),
    ("model.residual", "paralel", "did you mean 'parallel'?"),
    ("model.pretrained", "x" * 300, "is not a path"),
    ("metrics.meter", "a\0b", "is not a path"),
    ("metrics.meter", "/dev/zero", "name a regular file"),
    ("quality.results", "/", "name a regular file"),
    ("data", "text(path='')", "path = '': is empty"),
    ("plan.devices", 10**6, "at most 16,384"),
    ("train.optimizer", f"adamw(b2={LONG})", "below 1"),
    ("train.optimizer", "adamw(b2=0.999999999)", "below 1"),  # 1 as a float32
    ("train.optimizer", "adam", "did you mean 'adamw'?"),
    ("train.schedule", "cosine(peak=1e-3, warmup=100)", "a share of the steps"),
    ("train.schedule", "linear(peak=1e-3, warmup=1)", "below 1"),
    ("train.schedule", "constant(peak=-1e-3)", "peak = -0.001"),
    ("train.schedule", "cosine(peak=1e999)", "finite"),
    ("adapter", "lora(dropout=1.0)", "below 1"),
    ("adapter", "lora(target='([a-z')", "is no regex"),
    ("adapter", f"lora(rank={'-' * 3000}1)", "is not a spec"),
    ("adapter", "lora(**{'rank': 3})", "is not a spec"),
    ("quant", "int4(method='gp')", "did you mean 'gptq'?"),
    ("data", "text(path='x', document_size=0)", "at least 16"),
    ("data", "text(path='x', held_out=1.0)", "below 1"),
    ("tokenizer", "bpe(vocab_size=3)", "at least 257"),
    ("infer.sampler", "sample(top_p=0.0)", "above 0"),
    ("mesh", "data=0", "a whole number of devices"),
    ("mesh", "dat=1", "did you mean 'data'?"),
    ("mesh", "data", "is not a mesh; write sizes of axes"),
    ("mesh", ")(", "is not a mesh"),
    ("adapter", "lora()(rank=8)", "is not a spec"),
    ("model.mixer", "GQA", "did you mean 'gqa'?"),
    ("mesh", "data=-1, fsdp=-1", "only one axis may be -1"),
    ("plan.hardware", "h300", "no such hardware"),
    ("plan.of", "infr", "did you mean 'infer'?"),
    ("task", "pretain", "did you mean 'pretrain'?"),
    ("name", "../../x", "without a slash"),
    ("name", "", "names a folder"),
    ("name", "..", "names a folder"),
    ("name", "x" * 256, "at most 255"),
    ("profile.steps", "13:10", "ends before it begins; write '10:13'"),
    ("profile.steps", "10:300", "config.train.steps = 200 is its last step; write '10:200'"),
    ("profile.steps", "a", "is no range of steps"),
    ("sample.prompt", "", "set config.sample.tokens = 0"),
    ("sample.prompt", "\udc80", "is not text"),
]


def changed(**values):
    """The base config with values of any type, as code may set them."""
    config = base_config.get_config()
    with config.ignore_type():
        for key, value in values.items():
            config.update_from_flattened_dict({key: value})
    return config


@pytest.mark.parametrize("key, value, message", BAD_VALUES)
def test_a_value_out_of_its_range_is_refused_wherever_it_is_set(key, value, message):
    for check in (schema.validate_config, run.run):  # of a file or code, and of code that calls run alone
        with pytest.raises(UserError) as error:
            check(changed(**{key: value}))
        assert message in str(error.value) and str(error.value).startswith("config.") and len(str(error.value)) < 1000
    if "\0" not in str(value) and value == value and value != math.inf:
        with pytest.raises(UserError, match=r"config\."):
            main.parse([BASE, f"--config.{key}={value}"])


def test_every_number_of_the_config_has_a_range():
    numbers = {key for key, value in schema.default_values().items() if type(value) in (int, float)}
    assert numbers == key_ranges.KEYS.keys()
    assert all(value in key_ranges.KEYS[key] for key, value in schema.default_values().items() if key in numbers)


def test_defaults_are_allowed():
    """Values that are the default are not checked in a run."""
    for key, value in schema.default_values().items():
        value_rules.check_value(key, value, f"config.{key}")


KINDS = [kind for kind in registry.kinds() if not kind.endswith("_kernel") and kind not in ("task", "planned")]


def _packaged(kind):
    """The package's names of a kind, without classes and functions that other tests of this process have registered."""
    targets = {name: registry.lookup(kind, name) for name in registry.names(kind)}
    defined = {name for name, target in targets.items() if inspect.isclass(target) or inspect.isfunction(target)}
    return [n for n, target in targets.items() if n not in defined or target.__module__.startswith("efficientllm.")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_a_technique_has_a_range(kind):
    table = ranges.FIELDS.get(kind, {})
    fields = set()
    for name in _packaged(kind):
        parameters = registry.spec_parameters(registry.lookup(kind, name))
        fields |= {key for key, field in parameters.items() if field.annotation in (int, float, tuple)}
        for key, field in parameters.items():
            if field.annotation == int | tuple:  # a count, or sizes: checked by what reads them
                continue
            if type(field.default) in (int, float):
                assert field.default in table[key], (name, key)
    assert fields == table.keys()


@pytest.mark.parametrize("kind", registry.kinds())
def test_the_catalogue_knows_what_the_registry_knows(kind):
    entries = catalogue.entries(kind)
    assert list(entries) == _packaged(kind)
    for name, entry in entries.items():
        target = registry.lookup(kind, name)
        if entry.fields is not None and callable(target) and kind != "task":  # the runner fills a task's parameters
            fields = registry.spec_parameters(target).items()
            types = {key: registry.type_name(field.annotation) for key, field in fields}
            required = {key: field.default is field.empty for key, field in fields}
            assert {key: field.type or "_empty" for key, field in entry.fields.items()} == types, name
            assert {key: field.required for key, field in entry.fields.items()} == required, name


def test_every_text_that_names_something_is_checked():
    """The keys and fields that hold text of the user's, of which anything goes, are the exceptions."""
    texts = {key for key, value in schema.default_values().items() if isinstance(value, str | tuple)}
    assert texts - value_rules.KEYS.keys() == {"sample.prompt"}
    free = {"axis", "split", "name", "field", "messages", "prompt", "response", "system", "activations"}
    free |= {"letters", "image", "label", "caption", "captions", "question", "writer"}
    free |= {"images"}  # a folder, whose files are looked for one by one
    for kind in KINDS:
        for entry in catalogue.entries(kind).values():
            for key, field in (entry.fields or {}).items():
                assert field.type != "str" or key in free or (kind, key) in value_rules.FIELDS, (kind, key)


@pytest.mark.parametrize(
    "value, message",
    [
        ("12", "must be at least 1, at most 2,147,483,647 and whole, not a str"),
        (12.0, "not a float"),
        (True, "not True"),
        (None, "not None"),
        ([12], "not a list"),
        (np.int64(12), "not an int64 of numpy"),
    ],
)
def test_a_number_of_another_type_is_refused(value, message):
    with pytest.raises(UserError) as error:
        schema.validate_config(changed(**{"train.steps": value}))
    assert message in str(error.value) and "config.train.steps = " in str(error.value)


def test_types_of_the_other_kinds():
    with pytest.raises(UserError, match="config.model.tied = 1: must be True or False, not an int"):
        schema.validate_config(changed(**{"model.tied": 1}))
    config = base_config.get_config()
    config.quality = ConfigDict({**config.quality, "tasks": ["study"]})
    with pytest.raises(UserError, match="config.quality.tasks = .*: must be a tuple, not a list"):
        schema.validate_config(config)
    with pytest.raises(UserError, match="config.model.mixer = None: must be text, not None"):
        schema.validate_config(changed(**{"model.mixer": None}))
    with pytest.raises(UserError, match=r"config.train = 3: is a group of keys"):
        schema.validate_config(changed(train=3))
    assert schema.validate_config(changed(**{"train.clip": 2})).train.clip == 2.0


def test_the_schema_is_closed():
    config = base_config.get_config()
    config.model.mixr = "mla"
    with pytest.raises(UserError, match="config.model.mixr: the config has no key 'mixr'; did you mean 'mixer'?"):
        schema.validate_config(config)
    config = base_config.get_config()
    del config.train["steps"]
    with pytest.raises(UserError, match="config.train.steps is missing"):
        schema.validate_config(config)
    config = base_config.get_config()
    config.train = ConfigDict({"steps": config_dict.placeholder(int, required=True)})
    with pytest.raises(UserError, match="cannot be read"):
        schema.validate_config(config)
    for other in (None, {}, [], base_config):
        with pytest.raises(UserError, match="must return the ConfigDict"):
            schema.validate_config(other)
    assert (
        schema.validate_config(FrozenConfigDict(base_config.get_config())).to_dict()
        == base_config.get_config().to_dict()
    )


@pytest.mark.parametrize(
    "key, message",
    [
        ("train.lr", "the peak of config.train.schedule"),
        ("learning_rate", "the peak of config.train.schedule"),
        ("steps", "did you mean 'train.steps'?"),
        ("model.num_layers", "a field of config.model.size"),
        ("train.steps.x", "has no keys"),
        ("train", "is a group of keys; set one"),
        ("model.dtype", "config.model.precision"),
    ],
)
def test_a_key_that_is_elsewhere_is_pointed_to(key, message):
    with pytest.raises(UserError) as error:
        main.parse([BASE, f"--config.{key}=3"])
    assert message in str(error.value) and f"--config.{key}=3" in str(error.value)


@pytest.mark.parametrize(
    "flag, key, value",
    [
        ("train.steps=1_000", "train.steps", 1000),
        ("seed=0x10", "seed", 16),
        ("train.clip=2", "train.clip", 2.0),
        ("model.tied=false", "model.tied", False),
        ("model.scan", "model.scan", True),
        ("infer.prompts=What, then?", "infer.prompts", ("What, then?",)),
        ("infer.prompts=3", "infer.prompts", ("3",)),
        ("infer.stop=", "infer.stop", ()),
        ("infer.prompts=('a', 'b')", "infer.prompts", ("a", "b")),
        ("infer.prompts=['a']", "infer.prompts", ("a",)),
        ("infer.prompts='a'", "infer.prompts", ("a",)),
        ("model.pattern=gqa", "model.pattern", ("gqa",)),
        (r"adapter=lora(target='\w+')", "adapter", r"lora(target='\w+')"),
        ("sample.prompt=", "sample.prompt", ""),
    ],
)
def test_flags_are_read_as_what_their_key_holds(flag, key, value):
    config, _, _ = main.parse([BASE, "--config.task=infer", f"--config.{flag}"])
    assert flatten(config.to_dict())[key] == value


def test_other_spellings_of_flags():
    config, workdir, overwrite = main.parse(
        ["--config", f"{runs.ROOT}/configs/base.py", "--noconfig.model.tied", "--config.seed", "3", "--nooverwrite"]
        + ["--workdir", "x", "--config.infer.prompts=a", "--config.infer.prompts=b", "--config.seed=4"]
    )
    assert (config.model.tied, config.seed, config.infer.prompts) == (False, 4, ("a", "b"))
    assert (workdir, overwrite) == ("x", False)
    for flag, message in (
        ("--config.seed", "needs a value"),
        ("--noconfig.seed", "needs a value"),
        ("--overwrite=maybe", "is a switch"),
        ("--workdir=", "is empty"),
        ("--config.train.steps=1e3", "; write 1000"),
        ("--config.train.decay=(a, b)", "is not a tuple; write quotes"),
        (f"--workdir={'x' * 300}", "is not a path"),
    ):
        with pytest.raises(UserError, match=message):
            main.parse([BASE, flag])


def test_names_are_answered_before_jax_is_imported():
    code = """if True:
        import sys
        from efficientllm import main
        statuses = [main.main(["--config=base", f"--config.{flag}"]) for flag in sys.argv[1:]]
        print("jax" in sys.modules, "transformers" in sys.modules, set(statuses))
    """
    flags = ["model.mixer=gqaa", "train.optimizer=adam", "data=txt(path='x')", "adapter=lra", "quant=int5", "seed=-1"]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.stdout == "False False {2}\n" and done.stderr.count("\n") == len(flags), done.stderr


def test_an_inference_needs_a_prompt():
    with pytest.raises(UserError, match="config.infer.prompts = .*: needs a text; give one"):
        main.parse([BASE, "--config.task=infer", "--config.infer.prompts="])


def test_choices_of_a_typed_table_are_read():
    """A dict of the sources, which is not imported, may be annotated."""
    assert catalogue.constant("efficientllm.ffns.dense", "GELUS") == tuple(GELUS)
    assert tuple(catalogue.constant("efficientllm.sharding", "AXES")) == tuple(AXES)
    with pytest.raises(LookupError, match="assigns no NOTHING"):
        catalogue.constant("efficientllm.sharding", "NOTHING")
