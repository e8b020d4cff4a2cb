"""Setup of an inference run: model, mesh and requests. Cheap checks come first, and no array of the model is made."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence

import jax

from efficientllm import base_config, data, sharding
from efficientllm import model as models
from efficientllm.architecture import from_config
from efficientllm.cost import formulas
from efficientllm.embeds.patches import Denoiser
from efficientllm.embeds.tokens import LM
from efficientllm.errors import UserError, short_repr
from efficientllm.infer import image_samples, picture_setup, prompts
from efficientllm.infer.engine import check_prompts
from efficientllm.infer.picture_serving import PictureServing
from efficientllm.infer.row import baseline_of
from efficientllm.infer.serving import Serving, is_calibrated
from efficientllm.infer.text_serving import TextServing
from efficientllm.infer.vision_serving import VisionServing, encode_requests
from efficientllm.metrics import host
from efficientllm.ops import rematerialization
from efficientllm.quant import apply as quant
from efficientllm.registry import build, parse_spec
from efficientllm.run_description import RunDescription, describe_run
from efficientllm.runtime import optional_packages
from efficientllm.typing import Config, Mesh
from efficientllm.untrusted import patterns
from efficientllm.vision import processors

# Keys that requests of one kind alone have, with what to do where they are set for the other.
KEYS_OF = {
    "text": {
        "quality.tasks": "tasks of the lm-evaluation-harness are text, and the model reads images; leave them out",
        "infer.max_pixels": "limits pictures in prompts of a vision-language model; leave it out",
    },
    "images": {
        "infer.solver": "a language model has no solver; leave it out, or name a diffusion model",
        "infer.guidance": "a language model is not guided; leave it out, or name a diffusion model",
        "infer.guidance_channels": "a language model is not guided; leave it out, or name a diffusion model",
        "infer.negative_prompt": "a language model is not guided; leave it out, or name a diffusion model",
        "text_states": "a language model reads tokens; leave it out, or name a diffusion model",
        "infer.size": "a language model makes no pictures; leave it out, or name a diffusion model",
        "infer.fps": "a language model makes no clips; leave it out, or name a diffusion model",
        "infer.offload": "a language model has no parts that are needed in turn; leave it out",
    },
}


def check_request(config: Config) -> None:
    """Raises UserError for counts below 1, and for rules that conflict with `config.quant`."""
    for key in ("max_new_tokens", "batch_size", "prompt_length", "repeats"):
        if config.infer[key] < 1:
            raise UserError(f"config.infer.{key} = {config.infer[key]}: must be at least 1")
    if config.quant == "stored" and config.infer.rules:
        raise UserError("config.infer.rules: config.quant = 'stored' takes all weights as the files hold them; take ()")
    quant.form_of(config.quant, "config.quant")
    quant.chooser(config.quant, config.infer.rules, "config.infer.rules")


def prepare(config: Config, with_text: bool = True) -> Serving:
    """Builds the Serving of a config: reads prompts and descriptions, makes no array of the model.

    Without `with_text` the held-out text is not checked. Raises UserError.
    """
    check_request(config)
    description = describe_run(config, devices_of(config))
    check_mesh(config, description.mesh, description.objective.reads)
    check_keys(config, description.objective.reads)
    _check_baseline(config.infer.baseline, description)
    return _text_serving(description, with_text) if description.objective.reads == "text" else _pictures(description)


def _text_serving(description, with_text):
    config, infer = description.config, description.config.infer
    sampler = build("sampler", infer.sampler, where="config.infer.sampler")
    requests = prompts.read_lines(infer.prompts)
    if with_text:
        data.check_data(config.data)  # before a checkpoint is read, which can take a minute
    records, processor = None, None
    if description.lm.reads == "text and images":
        records, processor = _records(description, requests)
        ids = [list(record.ids) for record in records]
    else:
        if infer.max_pixels:
            raise UserError(f"config.infer.max_pixels = {infer.max_pixels}: the model reads no pictures; leave it out")
        ids = prompts.encode(prompts.read(infer.prompts), description.tokenizer, infer.chat)
    check_prompts(ids)
    prompts.check_lengths(ids, infer.max_new_tokens, description.max_positions)
    length = max(infer.prompt_length, *map(len, ids)) + infer.max_new_tokens
    fields = _shared(description, serving_lm(description, length)) | {
        "dataset": description.dataset,
        "tokenizer": description.tokenizer,
        "sampler": sampler,
        "texts": [request.text for request in requests],
        "prompts": ids,
        "length": length,
        "max_positions": description.max_positions,
    }
    return TextServing(**fields) if records is None else VisionServing(**fields, records=records, processor=processor)


def _records(description, requests):
    """`(prompts of a vision-language model with their images, the model's own processor)`."""
    if any(request.images for request in requests) and importlib.util.find_spec("PIL") is None:
        raise UserError(f"config.infer.prompts: images are read with Pillow; {optional_packages.remedy('images')}")
    lm, tokenizer = description.lm, description.tokenizer
    processor = processors.read_processor(description.source and description.source.tokenizer_path, lm)
    processor = processors.within(processor, description.config.infer.max_pixels, "config.infer")
    return encode_requests(requests, lm, tokenizer, processor, description.config.infer.chat), processor


def _pictures(description):
    picture_prompts, description = picture_setup.of_requests(description)
    if description.source is None:  # random weights of a model that says all of its pictures need no data
        description = dataclasses.replace(description, shapes_only=True)
    config, model = description.config, serving_denoiser(description)
    if config.sample.images and importlib.util.find_spec("PIL") is None:
        raise UserError(
            f"config.sample.images = {config.sample.images}: pictures are written with Pillow; "
            f"{optional_packages.remedy('images')}, or set it to 0"
        )
    needs_no_data = description.source is None and from_config.is_complete(description.model_config)
    return PictureServing(
        **_shared(description, model),
        dataset=None if needs_no_data or description.embed else description.dataset,
        sampler=image_samples.sampler_of(model, config.infer, description.objective),
        objective_spec=description.objective_spec,
        prompts=picture_prompts,
    )


def _shared(description, lm):
    """The fields of a Serving that every kind has."""
    return {
        "config": description.config,
        "source": description.source,
        "lm": lm,
        "objective": description.objective,
        "boxed": models.abstract_params(lm),
        "mesh": description.mesh,
        "rss_before": host.rss_bytes(),
    }


def check_keys(config: Config, reads: str) -> None:
    """Raises UserError for keys of requests that the model, which reads "text" or "images", does not have."""
    default = base_config.get_config()
    other = "images" if reads == "text" else "text"
    for key, advice in KEYS_OF[other].items():
        group, _, name = key.rpartition(".")
        value, usual = ((values[group] if group else values)[name] for values in (config, default))
        if value != usual:
            raise UserError(f"config.{key} = {short_repr(value)}: {advice}")


def serving_lm(description: RunDescription, length: int) -> LM:
    """The LM that serves rows of `length` tokens: that of the RunDescription, unrolled and without rematerialization.

    Raises UserError for more tokens than its positions, and for a rule that matches no weight.
    """
    infer = description.config.infer
    where = f"config.infer.prompt_length = {infer.prompt_length}, config.infer.max_new_tokens = {infer.max_new_tokens}"
    if description.max_positions and length > description.max_positions:
        raise UserError(f"{where}: {length} tokens; the model has {description.max_positions} positions")
    return _unrolled(description, length, where)


def serving_denoiser(description: RunDescription) -> Denoiser:
    """The Denoiser of the RunDescription, as `serving_lm` is the LM.

    Raises UserError likewise, and for a form of the weights that is calibrated.
    """
    config = description.config
    if is_calibrated(config.quant, config.infer.rules):
        raise UserError(
            f"config.quant = {config.quant!r}: is calibrated on text; give a diffusion model a form that rounds to the "
            "nearest, such as 'int4()'"
        )
    return _unrolled(description, description.length, "config.model.embed")


def _unrolled(description, length, where):
    lm = description.lm.clone(scan=False, remat=rematerialization.SAVEABLE)
    models.check_length(lm, length, where)
    _check_rules(models.abstract_params(lm), description.config.infer.rules)
    return lm


def _check_rules(boxed, rules):
    """Raises UserError for a rule whose pattern matches no weight."""
    paths = [path for path, _, _ in formulas.leaves(boxed) if quant.is_weight(path)]
    for pattern, form in rules:
        if not any(map(patterns.compile(pattern, "config.infer.rules").search, paths)):
            raise UserError(
                f"config.infer.rules: {pattern!r} ({form}) matches no kernel or table; there are {paths[0]}, "
                f"{paths[1]}...; norms, biases and routers keep their own type"
            )


def devices_of(config: Config) -> list[jax.Device]:
    """The first devices, as many as the axis sizes of `config.mesh` give (-1 counts as 1).

    Raises UserError for several processes.
    """
    _, axes = parse_spec(f"mesh({config.mesh})", "config.mesh")
    if jax.process_count() > 1:
        raise UserError("inference runs in one process, on as many of its devices as config.mesh names")
    sizes = [size for size in axes.values() if isinstance(size, int) and size > 0]
    return jax.devices()[: math.prod(sizes)]


def check_mesh(config: Config, mesh: Mesh, reads: str, batches: Sequence[str] = ("infer", "train")) -> None:
    """Raises UserError for a mesh with a `sequence` axis for text, or one that does not divide a batch size.

    `reads` is what the model reads. `batches` names groups of the config: requests (`infer`), held-out data (`train`).
    """
    where, shards = f"config.mesh = {config.mesh!r}", sharding.count_row_shards(mesh)
    if mesh.shape["sequence"] > 1 and reads == "text":
        raise UserError(
            f"{where}: a step of decoding has one token, which 'sequence' cannot divide; take tensor or data"
        )
    for key in batches:
        if (rows := config[key].batch_size) % shards:
            raise UserError(
                f"config.{key}.batch_size = {rows}: {where} divides rows over {shards} devices; "
                f"take a multiple of {shards}"
            )


def _check_baseline(baseline, description):
    """Raises UserError unless `baseline` is a row (.json), a `quant` spec, or empty."""
    if baseline.endswith(".json"):
        baseline_of(baseline, description.objective)
    elif baseline:
        build("quant", baseline, where="config.infer.baseline")
