"""A config.json whose every key is accounted for: honoured, known to change no logit, or refused by name."""

import json

from efficientllm.errors import UserError

# What no forward pass reads: book-keeping, training and generation. Dropouts act in training alone, where runs of ours
# have none.
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
    "use_associative_scan", "num_nextn_predict_layers", "unsloth_version", "unsloth_fixed",
})
# fmt: on
_MISSING = object()


class Keys:
    """The keys of a config.json, taken one by one; what is left at the end is checked by `finish`."""

    def __init__(self, config, where):
        self.where = where
        self._left = dict(config)

    def take(self, *names, default=_MISSING):
        """The value of the first of `names` that is there and not null. Raises UserError without it and a default."""
        found = [value for name in names if (value := self._left.pop(name, None)) is not None]
        if not found and default is _MISSING:
            raise UserError(f"{self.where}: key {names[0]!r} is missing")
        return found[0] if found else default

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
        """Raises UserError for a key that is neither taken nor harmless, unless its value says nothing."""
        for name, value in self._left.items():
            if name in HARMLESS or name.startswith("_") or value in (None, False, "") or value == [] or value == {}:
                continue
            raise self.refusal(name, value, "this family is not known to have that key")
