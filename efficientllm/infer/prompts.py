"""Prompts of `config.infer.prompts`: texts or a file, encoded as they are or through the chat template."""

import json
import logging
import os
import pathlib
import typing
from collections.abc import Sequence

from efficientllm.data import videos
from efficientllm.errors import UserError
from efficientllm.untrusted import files

log = logging.getLogger("efficientllm")


class PromptLine(typing.NamedTuple):
    """A prompt: its text, the files of its images, and what messages call it."""

    text: str
    images: tuple[pathlib.Path, ...] = ()
    name: str = ""


def read(prompts: str | Sequence[str]) -> list[str]:
    """Reads the texts of `read_lines`. Raises UserError for one with images, which a model of text does not see."""
    requests = read_lines(prompts)
    for request in requests:
        if request.images:
            raise UserError(f"{request.name}: has an image, and the model reads text alone; take 'image' out")
    return [request.text for request in requests]


def read_lines(prompts: str | Sequence[str]) -> list[PromptLine]:
    """Reads `config.infer.prompts`: texts, or one file name (.txt: a prompt a line; .jsonl: key `prompt`).

    A line of a .jsonl may name image files, `image` or a list of `images`, relative to its folder. Raises UserError.
    """
    prompts = (prompts,) if isinstance(prompts, str) else prompts
    for index, prompt in enumerate(prompts):
        _check_text(prompt, f"config.infer.prompts: prompt {index} = {prompt!r:.40}")
    if len(prompts) != 1 or not prompts[0].endswith((".txt", ".jsonl")):
        return [PromptLine(prompt, (), f"config.infer.prompts: prompt {index}") for index, prompt in enumerate(prompts)]
    file = pathlib.Path(os.path.expanduser(prompts[0]))
    where = f"config.infer.prompts = {prompts[0]!r}"
    text = files.read_text(file, where=where)
    # Not str.splitlines, which also splits at U+2028, U+0085 and others.
    lines = [(number, line) for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1) if line.strip()]
    if file.suffix != ".jsonl":
        return [PromptLine(line, (), f"{where}, line {number}") for number, line in lines]
    return [_request(line, f"{where}, line {number}", file.parent) for number, line in lines]


def _request(line, where, folder):
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: every line must be a JSON object with 'prompt' ({error})") from None
    if not isinstance(record, dict) or "prompt" not in record:
        raise UserError(f"{where}: every line must be a JSON object with 'prompt', not {line!r:.40}")
    _check_text(record["prompt"], f"{where}: 'prompt' = {record['prompt']!r:.40}")
    videos.refuse_fields(record, where)
    images = record.get("images") or record.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError(f"{where}: 'image' = {images!r:.40}: must be the name of a file, 'images' a list of them")
    return PromptLine(record["prompt"], tuple(folder / image for image in images), where)


def _check_text(prompt, where):
    if not isinstance(prompt, str):
        raise UserError(f"{where}: must be a text")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds a lone surrogate, half a character; take it out") from None


def encode(texts: Sequence[str], tokenizer: typing.Any, chat: bool) -> list[list[int]]:
    """Encodes texts as transformers does: text that spells a special token becomes that token.

    With `chat`, a text is the user's turn in the chat template, up to where the assistant's begins. Raises UserError
    where the tokenizer has no chat template.
    """
    if not chat:
        encoded = [list(map(int, tokenizer.encode_prompt(text))) for text in texts]
        for index, ids in enumerate(encoded):
            if len(ids) > 1 and ids[:1] == list(tokenizer.lead_ids[:1]) == ids[1:2]:
                name = tokenizer.text_of(ids[0])
                log.warning(f"prompt {index} spells {name}, which the tokenizer puts before it: it is there twice")
        return encoded
    if tokenizer.chat is None:
        raise UserError("config.infer.chat = True: the tokenizer has no chat template")
    return [
        tokenizer.encode_template(tokenizer.chat([{"role": "user", "content": text}], add_generation_prompt=True))
        for text in texts
    ]


def check_lengths(prompts: Sequence[Sequence[int]], new_tokens: int, max_positions: int | None) -> None:
    """Raises UserError naming the first prompt that exceeds `max_positions` with its completion (None: no limit)."""
    for index, prompt in enumerate(prompts):
        if max_positions and len(prompt) + new_tokens > max_positions:
            raise UserError(
                f"config.infer.prompts: prompt {index} has {len(prompt)} tokens, with config.infer.max_new_tokens = "
                f"{new_tokens} {len(prompt) + new_tokens}; the model has {max_positions} positions"
            )
