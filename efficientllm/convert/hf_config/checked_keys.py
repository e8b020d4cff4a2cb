"""A config.json whose every key is accounted for: honoured, known to change no logit, or refused by name.

A key that is missing has the value that the class of transformers gives it (`defaults`), one that is null has none. A
key that the class does not have is passed over, as transformers passes it over, unless its name speaks of what a model
computes (`SPEAKING`): another program would compute something else then, and which of them is right is not ours to say.
"""

import json
import re

from efficientllm.convert.hf_config.class_defaults import BASES, DEFAULTS
from efficientllm.errors import UserError

# Keys of the classes that no forward pass reads: book-keeping, training and generation. Dropouts act in training alone,
# where runs of ours have none.
# fmt: off
HARMLESS = frozenset({
    "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout", "dtype",
    "eos_token_id", "finetuning_task", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "label2id", "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "return_dict",
    "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
    "problem_type", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp",
    "transformers.js_config", "time_step_min", "time_step_max", "time_step_floor",
    "time_step_init_scheme", "time_step_scale", "rescale_prenorm_residual", "residual_in_fp32", "use_mambapy",
    "use_associative_scan", "num_nextn_predict_layers", "num_mtp_layers", "unsloth_version", "unsloth_fixed",
})
# Of published files, in which they say what the class does anyway (mamba-130m-hf, Mamba-Codestral), how the original
# program computed it, or how it was trained.
PUBLISHED = frozenset({
    "fused_add_norm", "rms_norm", "norm_before_gate", "n_layer", "moe_aux_loss_coeff", "router_z_loss_coef",
})
SPEAKING = frozenset({
    "softcap", "softcapping", "multiplier", "scale", "scaling", "scaler", "window", "windows", "sliding", "alibi",
    "mrope", "rope", "rotary", "norm", "norms", "layernorm", "bias", "expert", "experts", "router", "moe", "gate",
    "gated", "residual", "logit", "logits", "interleave", "interleaved", "act", "activation", "qk", "kv", "head",
    "heads", "layer", "layers", "quantization", "weights",
})
# fmt: on
_NEUTRAL_AT_ONE = frozenset({"multiplier", "scale", "scaling", "scaler"})
_MISSING = object()


class Keys:
    """The keys of a config.json, taken one by one; what is left at the end is checked by `finish`."""

    def __init__(self, config, where):
        self.where = where
        self._left = dict(config)
        self._type = config.get("model_type")
        self._defaults = DEFAULTS.get(self._type, {})

    @property
    def base(self):
        """The base of rotary positions that the class takes where no key says it."""
        return BASES.get(self._type, 10_000.0)

    @property
    def keeps_keys(self):
        """Whether the class leaves cached keys as they are where longrope changes its factors: all but Phi-3's."""
        return self._type != "phi3"

    def has(self, name):
        """Whether the file says a key that is not taken yet."""
        return self._left.get(name) is not None

    def take(self, *names, default=_MISSING):
        """The value of a key that has several names; `default` where it is null, or missing and the class has none.

        Raises UserError where two of the names are there and differ, and for no value without a default.
        """
        given = {name: value for name in names if (value := self._left.get(name)) is not None}
        there = any(name in self._left for name in names)
        for name in names:
            self._left.pop(name, None)
        if len(set(map(repr, given.values()))) > 1 and not _all_equal(given.values()):
            said = ", ".join(f"{name} = {json.dumps(value)}" for name, value in given.items())
            raise UserError(f"{self.where}: {said}: names of one key that differ; keep one of them")
        found = next(iter(given.values()), None)
        if found is None and not there:
            found = next((self._defaults[name] for name in names if self._defaults.get(name) is not None), None)
        if found is None and default is _MISSING:
            raise UserError(f"{self.where}: key {names[0]!r} is missing")
        return default if found is None else found

    def number(self, *names, kind=int, default=_MISSING):
        """A value that must be a number of `kind`, and more than zero."""
        value = self.take(*names, default=default)
        right = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if value is not default and not (right and value > 0):
            raise UserError(f"{self.where}: {names[0]} = {value!r} must be a positive {kind.__name__}")
        return value

    def expect(self, name, *known, because):
        """Takes a key that has one value only here, the first of `known` where it is missing. Raises UserError."""
        value = self._left.pop(name, None)
        if value is not None and value not in known:
            raise self.refusal(name, value, because)

    def refusal(self, name, value, because):
        """The error that refuses a key by name."""
        return UserError(f"{self.where}: {name} = {json.dumps(value)} is not supported: {because}")

    def finish(self):
        """Raises UserError for a key that is neither taken nor harmless, and whose name speaks of what is computed."""
        for name, value in self._left.items():
            if name in HARMLESS or name in PUBLISHED or not speaks(name, value):
                continue
            raise self.refusal(name, value, "this family is not known to have that key")


def speaks(name, value):
    """Whether a key that no class has says of a model that it computes something else."""
    if name.startswith("_") or value in (None, False, "") or value == [] or value == {}:
        return False
    words = SPEAKING.intersection(re.split(r"[^a-z0-9]+", name.lower()))
    if words & _NEUTRAL_AT_ONE and value == 1:
        return False
    return bool(words) and not (name == "layer_types" and set(value) == {"full_attention"})


def _all_equal(values):
    first, *rest = values
    return all(value == first and isinstance(value, bool) == isinstance(first, bool) for value in rest)
