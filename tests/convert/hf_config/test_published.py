"""config.json of published models, key by key, against what the classes of transformers make of them.

`published.jsonl` holds facts of files: `source` is the file, `read_in` where they were read if not there; without it
they are recalled. Nothing is downloaded.
"""

import dataclasses
import json
import pathlib

import pytest

from convert import peers
from convert.peers import transformers
from efficientllm.architecture import from_config
from efficientllm.convert.hf_config import families, to_hf
from efficientllm.convert.hf_config.canonical import canonical, differences
from efficientllm.convert.hf_config.checked_keys import HARMLESS
from efficientllm.convert.hf_config.class_defaults import BASES, DEFAULTS
from efficientllm.errors import UserError
from tiers import slow_except

pytestmark = pytest.mark.quick

LINES = pathlib.Path(__file__).with_name("published.jsonl").read_text().splitlines()
PUBLISHED = [json.loads(line) for line in LINES]
NAMES = [f"{entry['name']}-{i}" for i, entry in enumerate(PUBLISHED)]
# One of each kind: the last of a family has the most keys of it.
KINDS = {(entry["config"]["model_type"], "rope_parameters" in entry["config"]): entry for entry in PUBLISHED}


def plain(entry):
    """A config.json of few layers, without what it says of how its weights are rounded."""
    config = {key: value for key, value in entry["config"].items() if key != "quantization_config"}
    return config | {"num_hidden_layers": min(config["num_hidden_layers"], 4)}


def class_of(config):
    return transformers.models.auto.configuration_auto.CONFIG_MAPPING[config["model_type"]]


def as_transformers_reads_it(config):
    """All that its class makes of a config.json, as it would save it."""
    copy = json.loads(json.dumps({key: value for key, value in config.items() if key != "model_type"}))
    read = class_of(config)(**copy)
    whole = {field.name: getattr(read, field.name) for field in dataclasses.fields(read)}
    extra = {
        key: getattr(read, key) for key in config if hasattr(read, key) and key not in ("architectures", "auto_map")
    }
    return json.loads(json.dumps(whole | extra | {"model_type": config["model_type"]}, default=str))


def meaning(config):
    """What our logits depend on: the overrides of `config.model`, and the most positions."""
    described = families.describe_config(config, "config.json")
    return described.model, described.max_positions


def assert_same(ours, theirs):
    if ours != theirs:  # said in other words, or another model
        models = [canonical(from_config.from_config(from_config.complete_model(model))) for model, _ in (ours, theirs)]
        assert ours[1] == theirs[1] and not differences(*models)


@pytest.mark.parametrize("entry", PUBLISHED, ids=NAMES)
def test_it_is_read_as_transformers_reads_it(entry):
    config = plain(entry)
    assert_same(meaning(config), meaning(as_transformers_reads_it(config)))


@pytest.mark.parametrize("entry", KINDS.values(), ids=lambda entry: entry["name"])
def test_an_omitted_key_takes_the_default_of_the_class(entry):
    config = plain(entry)
    for key in config:
        if key == "model_type":
            continue
        less = {name: value for name, value in config.items() if name != key}
        try:
            theirs = as_transformers_reads_it(less)
        except Exception:  # what transformers cannot read either
            continue
        try:
            description = meaning(less)
        except UserError as error:
            assert key in str(error) or "multiple" in str(error), f"{key} omitted: {error}"
            continue
        assert_same(description, meaning(theirs))


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults_are_those_of_the_class(model_type):
    """All fields but those that change nothing, and the base of the rotation."""
    config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    common = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    values = {
        field.name: field.default for field in dataclasses.fields(config_class) if field.name not in common | HARMLESS
    }
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    assert {key: value for key, value in values.items() if value is not None} == DEFAULTS[model_type]
    assert BASES.get(model_type, 10_000.0) == config_class.default_theta


OTHER = {
    "hidden_act": "gelu_new",
    "time_step_rank": 7,
    "time_step_limit": [0.0, 0.5],
    "topk_method": "group_limited_greedy",
    "n_group": 2,
    "topk_group": 2,
    "mlp_only_layers": [1],
    "layer_types": ["chunked_attention"] * 4,
    "rope_parameters": {"rope_theta": 777.0, "rope_type": "default"},
    "head_dim": 24,
    "original_max_position_embeddings": 64,
}
# Of these the class makes nothing, or what it makes is no other function here.
UNREAD = {
    "deepseek_v2": {"head_dim", "n_group", "topk_group", "topk_method"},  # of no groups
    "mamba2": {"time_step_rank", "chunk_size"},
    "phi3": {"original_max_position_embeddings"},  # read where rope is scaled
    "qwen2": {"sliding_window", "max_window_layers"},  # without use_sliding_window
    "qwen3": {"sliding_window", "max_window_layers"},
    "qwen2_moe": {"sliding_window", "max_window_layers"},
    "qwen3_moe": {"sliding_window"},
}


def other(value):
    """A value of the same type that is not this one."""
    if isinstance(value, bool) or value is None:
        return not value
    return value * 2


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_no_key_of_a_class_is_read_over(model_type):
    """A changed value is another model, or is refused, or is listed as one that changes nothing."""
    config = DEFAULTS[model_type] | {"model_type": model_type, "num_hidden_layers": 4, "hidden_size": 64}
    fields = {field.name for field in dataclasses.fields(class_of(config))}
    small = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_window_layers": 2}
    config |= {key: value for key, value in (small | {"num_heads": 2, "mlp_only_layers": [0]}).items() if key in fields}
    config |= {"first_k_dense_replace": 1} if "first_k_dense_replace" in fields else {}
    before = meaning(config)
    silent = set()
    for key in sorted(fields - HARMLESS):
        changed = config | {key: OTHER[key] if key in OTHER else other(config.get(key))}
        try:
            same = meaning(changed) == before
        except UserError as error:
            assert "\n" not in str(error)
            continue
        if same:
            silent.add(key)
    assert silent == UNREAD.get(model_type, set())


FAMILIES = ("llama", "mixtral", "deepseek-v3", "mamba", "qwen3-moe", "deepseek-v2", "mamba2", "gpt-neox")


@pytest.mark.parametrize("name", slow_except(FAMILIES, *FAMILIES[:4]))
def test_harmless_keys_change_no_logit(name):
    """Of transformers' own model, in inference."""
    theirs = peers.reference(name)
    fields = {field.name for field in dataclasses.fields(theirs.config)} & HARMLESS
    values = {key: getattr(theirs.config, key) for key in fields}
    numbers = {key: other(value) for key, value in values.items() if isinstance(value, bool | int | float)}
    changed = {key: value for key, value in numbers.items() if key not in ("output_attentions", "return_dict")}
    changed |= {key: 0.5 for key in changed if key.endswith(("dropout", "pdrop", "range", "noise"))}
    read = type(theirs.config)(**theirs.config.to_dict() | changed)
    read._attn_implementation = read._experts_implementation = "eager"
    again = type(theirs)(read).eval()
    again.load_state_dict(theirs.state_dict())
    ids = peers.tokens()
    peers.close(peers.their_logits(again, ids), peers.their_logits(theirs, ids), 1e-6)


UNSAID = {"max_length": 20, "temperature": 0.6, "top_p": 0.9, "do_sample": True, "num_beams": 4, "model_max_length": 99}
UNSAID |= {"document_attention": True, "is_qwen2_config": True, "neftune_noise_alpha": 5.0, "use_cache": False}
UNSAID |= {"logits_scaling": 1.0, "residual_multiplier": 1, "layer_types": ["full_attention"] * 4, "qk_norm": False}


def test_keys_that_no_class_has_are_passed_over_as_transformers_does():
    config = plain(PUBLISHED[0])
    assert meaning(config | UNSAID) == meaning(config)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 9},
        {"final_logit_softcapping": 30.0},
        {"attention_multiplier": 0.1},
        {"use_qk_norm": True},
        {"layer_types": ["sliding_attention"] * 4},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"transformers_weights": "other.safetensors"},
        {"no_rope_layers": [1, 0]},
        {"num_kv_heads": 2},
    ],
)
def test_keys_that_speak_of_what_is_computed_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        meaning(plain(PUBLISHED[0]) | change)


def with_scaling(**keys):
    """A Llama with a rotation said at several places."""
    return plain(PUBLISHED[0]) | {"rope_theta": 500.0, "rope_scaling": None} | keys


LOW_AND_HIGH = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
MIXTRAL = {"model_type": "mixtral", "architectures": None, "attention_bias": False}
BOTH = {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 500.0}}


def test_a_key_in_two_places_is_refused_only_where_they_differ():
    assert meaning(with_scaling(**BOTH)) == meaning(with_scaling(rope_scaling={"type": "linear", "factor": 2.0}))
    for change, message in [
        ({"rope_theta": 501.0}, "rope_theta = 501.0"),
        ({"rope_scaling": LINEAR | {"factor": 3.0}}, "factor = 3.0 in rope_scaling"),
        (
            {"num_experts": 2, "num_local_experts": 3, "model_type": "mixtral", "architectures": None},
            "num_local_experts",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            meaning(with_scaling(**BOTH | change))


def test_the_base_of_gpt_neox_has_a_name_of_its_own():
    """transformers passes over rope_theta there."""
    config = plain(next(entry for entry in PUBLISHED if entry["config"]["model_type"] == "gpt_neox"))
    assert meaning(config | {"rope_theta": 10000, "partial_rotary_factor": 0.25}) == meaning(config)
    with pytest.raises(UserError, match="rope_theta = 500"):
        meaning({key: value for key, value in config.items() if key != "rotary_emb_base"} | {"rope_theta": 500})


@pytest.mark.parametrize(
    "scaling, most",
    [
        ({"rope_type": "yarn", "factor": 4.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 16}, 32),
        ({"rope_type": "linear", "factor": 4.0}, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, 64),
        ({"rope_type": "llama3", "original_max_position_embeddings": 16, "factor": 2.0} | LOW_AND_HIGH, 32),
    ],
)
def test_what_scaling_is_for_can_be_used(scaling, most):
    """And an export says the same of the positions that it is given."""
    config = with_scaling(rope_scaling=scaling, max_position_embeddings=32)
    model, max_positions = meaning(config)
    assert max_positions == most
    lm = from_config.from_config(from_config.complete_model(model))
    assert meaning(to_hf.config_of("llama", lm, canonical(lm), max_positions))[1] == most
