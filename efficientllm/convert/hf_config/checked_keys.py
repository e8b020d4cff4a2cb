"""Strict reader of a config.json: every key is honoured, harmless (it changes no logit), or refused by name.

A missing key has the default of its class in transformers (`class_defaults`); a null key has no value. transformers
ignores keys that its class does not have, and so does this reader, unless the name suggests that the model computes
something else (`SPEAKING`): then another program may have honoured the key.
"""

import json
import os
import re
import typing

from efficientllm.convert.hf_config.class_defaults import BASES, DEFAULTS, DIFFUSERS, ENCODERS
from efficientllm.convert.hf_config.vision_defaults import VISION
from efficientllm.errors import UserError

# Keys that no forward pass reads: book-keeping, training and generation. Dropout acts in training only, and our
# training has none.
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
# Keys of published files that state what the class does anyway (mamba-130m-hf, Mamba-Codestral), or how the model was
# computed or trained originally.
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


class CheckedKeys:
    """The keys of a config.json, taken one by one; `finish` checks the rest."""

    def __init__(self, config: dict[str, typing.Any], where: str | os.PathLike[str]):
        self.where = where
        self._left = dict(config)
        self._type = config.get("model_type")
        self._defaults = (DEFAULTS | ENCODERS | VISION).get(self._type) or DIFFUSERS.get(config.get("_class_name"), {})

    @property
    def base(self) -> float:
        """The class's default base of rotary positions."""
        return BASES.get(self._type, 10_000.0)

    @property
    def keeps_keys(self) -> bool:
        """True if cached keys keep their rotation when longrope switches factors: all classes but Phi-3's."""
        return self._type != "phi3"

    def has(self, name: str) -> bool:
        """True if the file has a value for a key that is not taken yet."""
        return self._left.get(name) is not None

    def take_all(self, chosen: typing.Callable[[str], bool]) -> dict[str, typing.Any]:
        """Takes all keys with a `chosen` name, with their values."""
        return {name: self._left.pop(name) for name in [*self._left] if chosen(name)}

    def take(self, *names: str, default: typing.Any = _MISSING) -> typing.Any:
        """Takes the value of a key with several names; `default` if it is null, or missing without a class default.

        Raises UserError if two names are present and differ, or if there is neither value nor default.
        """
        values = {name: value for name in names if (value := self._left.get(name)) is not None}
        present = any(name in self._left for name in names)
        for name in names:
            self._left.pop(name, None)
        if len(set(map(repr, values.values()))) > 1 and not _all_equal(values.values()):
            listed = ", ".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
            raise UserError(f"{self.where}: {listed}: names of one key that differ; keep one of them")
        chosen = next(iter(values.values()), None)
        if chosen is None and not present:
            chosen = next((self._defaults[name] for name in names if self._defaults.get(name) is not None), None)
        if chosen is None and default is _MISSING:
            raise UserError(f"{self.where}: key {names[0]!r} is missing")
        return default if chosen is None else chosen

    def number(self, *names: str, kind: type = int, default: typing.Any = _MISSING) -> typing.Any:
        """Takes a positive number of `kind`."""
        value = self.take(*names, default=default)
        right = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if value is not default and not (right and value > 0):
            raise UserError(f"{self.where}: {names[0]} = {value!r} must be a positive {kind.__name__}")
        return value

    def expect(self, name: str, *supported: typing.Any, because: str) -> None:
        """Takes a key for which only the values `supported` are. Raises UserError, with the reason `because`."""
        value = self._left.pop(name, None)
        if value is not None and value not in supported:
            raise self.refusal(name, value, because)

    def refusal(self, name: str, value: typing.Any, because: str) -> UserError:
        """The UserError that refuses a key by name."""
        return UserError(f"{self.where}: {name} = {json.dumps(value)} is not supported: {because}")

    def finish(self) -> None:
        """Raises UserError for a remaining key that may change what the model computes."""
        for name, value in self._left.items():
            if name in HARMLESS or name in PUBLISHED or not speaks(name, value):
                continue
            raise self.refusal(name, value, "this family is not known to have that key")


def speaks(name: str, value: typing.Any) -> bool:
    """True if the name of an unknown key suggests that the model computes something else."""
    if name.startswith("_") or value in (None, False, "") or value == [] or value == {}:
        return False
    words = SPEAKING.intersection(re.split(r"[^a-z0-9]+", name.lower()))
    if words & _NEUTRAL_AT_ONE and value == 1:
        return False
    return bool(words) and not (name == "layer_types" and set(value) == {"full_attention"})


def _all_equal(values):
    first, *rest = values
    return all(value == first and isinstance(value, bool) == isinstance(first, bool) for value in rest)
