"""`VisionServing`: prompts with images and their completions as the requests of an inference run."""

import dataclasses
import typing
from collections.abc import Sequence

import jax
import numpy as np

from efficientllm.cost import formulas
from efficientllm.data import videos
from efficientllm.embeds.vision_language import VisionLM
from efficientllm.embeds.vision_tower import VisionTower
from efficientllm.errors import UserError
from efficientllm.infer import measure, prompts
from efficientllm.infer.decoding import Carry
from efficientllm.infer.engine import Engine
from efficientllm.infer.measure import ServingMeasurement
from efficientllm.infer.multimodal_prompts import ImageRows, encode_prompts
from efficientllm.infer.text_serving import TextServing
from efficientllm.metrics.energy.window import EnergyReader
from efficientllm.metrics.sampler import Sampler
from efficientllm.model import parts
from efficientllm.typing import Params, PyTree, Record
from efficientllm.vision.conversations import marked_token, template_messages
from efficientllm.vision.processors import Processor, load_picture
from efficientllm.vision.token_rows import Prompt, token_row
from efficientllm.vision.tower_rows import PreparedImage, group_windows, merged_grid


class VisionEngine(Engine):
    """An engine whose prompts have images: those of `records`, by the index of a prompt."""

    def __init__(self, records: Sequence[Prompt], *args: typing.Any) -> None:
        super().__init__(*args)
        self.records = records

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int = 0,
        first: int = 0,
        carry: Carry | None = None,
        images: ImageRows | None = None,
    ) -> Carry:
        """Computes the features of the prompts' images first; see `Engine.prefill`."""
        records = self.records[first : first + len(prompts)]
        if images is None and any(len(record.pictures) for record in records):
            _, images = encode_prompts(self.lm, self.params, records)  # type: ignore[arg-type]
        return super().prefill(prompts, seed, first, carry, images)

    def encode(self) -> jax.Array:
        """Computes the features of the images of all prompts at once, and waits for them."""
        _, images = encode_prompts(self.lm, self.params, self.records)  # type: ignore[arg-type]
        return jax.block_until_ready(images.features_BMD)


@dataclasses.dataclass(kw_only=True)
class VisionServing(TextServing):
    """A vision-language model to serve; `records` are the prompts with their pictures, which `processor` made."""

    lm: VisionLM
    records: list[Prompt]
    processor: Processor

    def engine(self, params: Params) -> Engine:
        return VisionEngine(self.records, self.lm, params, self.sampler, self.tokenizer.end_ids, self.length)

    def measure(self, engine: Engine, reader: EnergyReader, averages: Sampler) -> ServingMeasurement:
        """Measures batches of the first prompt with images, of which prefill computes the features; else of text."""
        measured = next((i for i, record in enumerate(self.records) if len(record.pictures)), None)
        if measured is None:
            return super().measure(engine, reader, averages)
        infer, record, ids = self.config.infer, self.records[measured], self.prompts[measured]
        arguments = (self.lm, engine.params, self.sampler, self.tokenizer.end_ids, self.length)
        of_images = VisionEngine([record] * infer.batch_size, *arguments)
        shape = infer.batch_size, len(ids), infer.max_new_tokens, infer.repeats
        prompts = [ids] * infer.batch_size
        flops = sum(image_flops(self.lm.vision, self.boxed["vision"], picture) for picture in record.pictures)
        images = measure.Images(of_images.encode, len(record.pictures), flops)
        return measure.measure(of_images, np.array(ids), *shape, reader, averages, self.config.seed, prompts, images)

    def facts(self) -> Record:
        pictures = [picture for record in self.records for picture in record.pictures]
        return super().facts() | {"images": len(pictures), "image_tokens": sum(picture.tokens for picture in pictures)}


def image_flops(tower: VisionTower, boxed: PyTree, picture: PreparedImage) -> float:
    """Counts the forward FLOPs of a tower for one image: all products, and the pairs within frames and windows."""
    frames, rows, columns = picture.grid
    slots = len(picture.pixels_Pc) + frames * tower.class_token
    linear = formulas.forward_flops(tower, boxed, slots) - formulas.mixer_flops(tower, slots)
    windows = group_windows(merged_grid(picture.grid, tower.merge), tower.window) if tower.window else []
    reach = {
        False: [rows * columns + tower.class_token] * frames,
        True: [len(window) * tower.merge**2 for window in windows],
    }
    pairs = 0.0
    for block, numbers in zip(parts(tower), tower.stacks.layer_numbers, strict=True):
        for mixer in block.mixers:
            lengths = reach[mixer.bin > 0]
            pairs += len(numbers) * sum(mixer.mix_flops(length, order=tower.order) for length in lengths)
    return linear + pairs


def encode_requests(
    requests: Sequence[prompts.PromptLine], lm: VisionLM, tokenizer: typing.Any, processor: Processor, chat: bool
) -> list[Prompt]:
    """Prepares the images of requests and encodes their texts, in the chat template or as they are.

    A text without image tokens has its images before it. Raises UserError, with the request's name.
    """
    return [_encode(request, lm, tokenizer, processor, chat) for request in requests]


def _encode(request, lm, tokenizer, processor, chat):
    videos.refuse_places(request.text, request.name)
    try:
        pictures = [processor.prepare(load_picture(file, str(file))) for file in request.images]
    except UserError as error:
        raise UserError(f"{request.name}: {error}") from None
    if chat:
        if tokenizer.chat is None:
            raise UserError("config.infer.chat = True: the tokenizer has no chat template")
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": request.text}]
        messages = [{"role": "user", "content": content}]
        if marked_token(token := tokenizer.text_of(lm.image_token)) == token:  # else the marks are added below
            messages = template_messages(messages, len(pictures), lm, tokenizer)
        text = tokenizer.chat(messages, add_generation_prompt=True)
        ids = tokenizer.encode_template(_marked(text, lm, tokenizer))
    else:
        ids = [*map(int, tokenizer.encode_prompt(request.text))]
        if lm.image_token not in ids:
            lead = len(tokenizer.lead_ids) if ids[: len(tokenizer.lead_ids)] == list(tokenizer.lead_ids) else 0
            ids[lead:lead] = [lm.image_token] * len(pictures)
    prompt = Prompt(ids, pictures, request.name)
    return prompt._replace(ids=token_row(lm, prompt).ids_T.tolist())


def _marked(text, lm, tokenizer):
    """Puts a family's marks around image tokens, where its template does not."""
    token = tokenizer.text_of(lm.image_token)
    return text if "<img>" in text else text.replace(token, marked_token(token))
