"""A request as it would be served: prefill and decoding, described from a config alone and compiled without arrays."""

import dataclasses
import functools
import typing

import flax.linen as nn
import jax

from efficientllm import model, sharding
from efficientllm.cost import formulas
from efficientllm.infer import setup as infer
from efficientllm.infer.engine import Engine
from efficientllm.metrics.reading import Reading
from efficientllm.plan import remedies, training_step
from efficientllm.quant import apply as quant
from efficientllm.registry import build, register
from efficientllm.run_description import describe_run
from efficientllm.runtime import kernel_choice
from efficientllm.weights import box_as, resident_bytes

FIRST = ("prefill", "first logits")  # the programs before the first token


@dataclasses.dataclass(frozen=True)
class Request:
    """What is served: prompts of `config.infer.prompt_length` tokens, `infer.batch_size` at once, and answers to them.

    The prompts that a run shows answers to are no part of it: no tokenizer is there to count them.
    `shaped` are the abstract parameters in the form `config.quant`, on their shardings.
    """

    config: object
    lm: object
    mesh: object
    boxed: dict
    shaped: dict
    platform: str
    capability: tuple = (0, 0)

    def scope(self):
        """Where it is traced and compiled: its mesh, and kernels for its platform and compute capability."""
        return training_step.scope(self.mesh, self.platform, self.capability)

    @property
    def samples(self):
        return self.config.infer.batch_size

    @property
    def length(self):
        """Tokens of a row, prompt and answer."""
        return self.config.infer.prompt_length + self.config.infer.max_new_tokens

    @property
    def tokens(self):
        """Tokens that a request makes."""
        return self.samples * self.config.infer.max_new_tokens

    @property
    def heading(self):
        ours = self.config.infer
        return (
            f"{self.samples} x {ours.prompt_length} tokens and {ours.max_new_tokens} after them as {self.config.quant}"
        )

    def programs(self):
        """The Parts of a request: the pass over the prompts, the first logits, and as many steps as there are tokens.

        A step's FLOPs and bytes are those in the middle of an answer, as a run's row has them.
        """
        ours, middle = self.config.infer, self.config.infer.prompt_length + self.config.infer.max_new_tokens // 2
        engine = Engine(self.lm, self.shaped, build("sampler", ours.sampler), 0, self.length)
        with self.scope(), kernel_choice.recording_kernels() as of_prefill:
            prefill, read_out = engine.trace_prefill(self.samples, ours.prompt_length)
        with self.scope(), kernel_choice.recording_kernels() as of_decode:
            decode = engine.trace_decode(self.samples)
        head = 2 * self.samples * self.lm.dim * self.lm.vocab_size
        passed = self.samples * formulas.forward_flops(self.lm, self.boxed, ours.prompt_length)
        passed -= ours.prompt_length * head  # logits of the last token alone, and those by `read_out`
        stepped = self.samples * formulas.decode_flops(self.lm, self.boxed, middle)
        used = {name: sorted(kinds) for name, kinds in of_prefill.items()}
        return [
            training_step.Part(FIRST[0], 1, prefill, used, passed, self.held),
            training_step.Part(FIRST[1], 1, read_out, {}, head, 0),
            training_step.Part(
                "decode",
                ours.max_new_tokens,
                decode,
                {name: sorted(kinds) for name, kinds in of_decode.items()},
                stepped,
                self.moved(middle),
                turns=1,
            ),
        ]

    def plain(self):
        """The same in products that a jaxpr shows: of weights that are not rounded."""
        config = training_step.changed(self.config, {"quant": "float32", "infer.rules": ()})
        return describe(config, list(self.mesh.devices.flat), "tpu")

    @functools.cached_property
    def weights(self):
        """Bytes of the parameters, over all devices once."""
        return resident_bytes(self.shaped)

    @functools.cached_property
    def held(self):
        """Bytes of the weights and of all rows' states at their longest, of the device that holds most."""
        with self.scope():
            states = jax.eval_shape(lambda: model.init_states(self.lm, self.samples, self.length))
            states = sharding.shapes(states, model.state_axes(self.lm, states))
        return sharding.local_bytes(self.shaped) + sharding.local_bytes(states)

    def moved(self, length):
        """Bytes that a device reads in a step over states of `length` tokens: of what the devices that have the same
        rows read together, the part that it holds."""
        rows = self.samples // sharding.row_ways(self.mesh)
        together = formulas.decode_bytes(self.lm, self.boxed, self.shaped, rows, length)
        return together * self.held / (self.weights + rows * formulas.state_bytes(self.lm, self.length))

    def by_shapes(self):
        """Bytes of a device's weights and states."""
        return self.held

    def sent_by_formula(self):
        """Its Collectives: one device sends nothing, and for several there is no formula."""
        return () if self.mesh.size == 1 else None

    def candidates(self):
        """The single changes that could make it fit (`plan.remedies`)."""
        plain = nn.unbox(self.boxed)
        smaller = [
            form
            for form in remedies.FORMS
            if resident_bytes(quant.abstract(plain, form, self.config.infer.rules)) < self.weights
        ]
        return remedies.of_serving(self.config, smaller)

    def rates(self, seconds):
        """The study's throughput of a request that takes so long."""
        return {"it_tokens_per_s": self.tokens / seconds}

    def latencies(self, parts):
        """The least time to the first token and that of another, of the Estimates of `programs`."""
        *first, step = (parts[name][1].roofline.seconds for name in (*FIRST, "decode"))
        return {"ttft_s": None if None in first else sum(first), "tpot_s": step}

    no_rates: typing.ClassVar = ("it_tokens_per_s",)
    no_mcr: typing.ClassVar = "how good the weights still are in this form is measured"

    def readings(self):
        """What is known of the model and is no cost, as Readings."""
        middle = self.config.infer.prompt_length + self.config.infer.max_new_tokens // 2
        flops = formulas.decode_flops(self.lm, self.boxed, middle)
        state = formulas.state_bytes(self.lm, self.length) / self.length
        formula = f"closed formula ({formulas.FLOP_CONVENTION}), token {middle}"
        return {
            "flops_per_token": Reading(flops, "FLOP", formula),
            "resident_weight_bytes": Reading(self.weights, "bytes", "parameter tree"),
            "kv_bytes_per_token": Reading(state, "bytes", f"closed formula, row of {self.length}"),
        }


def whole(config, mesh):
    """The config, checked as a run's: its batch is taken as it is."""
    infer.check_request(config)
    return config


def describe(config, devices, platform, capability=(0, 0)):
    """The Request of a config on `devices`, for the `platform` that it is compiled for."""
    run = describe_run(config, devices, shapes_only=True)
    infer.check_mesh(config, run.mesh, ("infer",))
    with training_step.target(platform, capability):
        lm = infer.serving_lm(run, config.infer.prompt_length + config.infer.max_new_tokens)
        boxed = model.abstract_params(lm)
    rounded = quant.abstract(nn.unbox(boxed), config.quant, config.infer.rules)
    shaped = sharding.on_shards(box_as(boxed, rounded), run.mesh)
    return Request(config, lm, run.mesh, boxed, shaped, platform, capability)


register("planned", "infer")(training_step.Planned(whole, describe, ("infer",)))
