"""Conversations about pictures to tokens: one image token for each picture, and the loss mask of the answers."""

import json
import typing

import numpy as np

from efficientllm.data import conversation
from efficientllm.data.base import Example
from efficientllm.embeds.vision_language import VisionLM
from efficientllm.errors import UserError

Message = dict[str, typing.Any]


def encode_example(example: Example, lm: VisionLM, tokenizer: typing.Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes an example, end token included: int32 ids `[T]`, and bool `[T]`, which of them are learnt.

    A text without a place for its pictures has them before it. Raises UserError, with the example's name, where places
    and pictures differ in number.
    """
    messages = place_pictures(example.messages, len(example.pictures), example.name)
    if tokenizer.chat is None:
        ids, learnt = _plain(messages, lm, tokenizer)
    else:
        messages = template_messages(messages, len(example.pictures), lm, tokenizer)
        ids, learnt = conversation.encode(tokenizer, json.dumps(messages))
    return np.asarray(ids, np.int32), np.asarray(learnt, bool)


def place_pictures(messages: list[Message], count: int, name: str) -> list[Message]:
    """Returns the messages with a part `{"type": "image"}` for each of `count` pictures, and users' texts in parts."""
    messages = [message | {"content": _parts(message["content"])} for message in messages]
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if not places and count:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = [{"type": "image"}] * count + first["content"]
    elif places != count:
        raise UserError(f"{name}: {places} places for images in its text and {count} images; write one for each")
    return messages


def _parts(content):
    if not isinstance(content, str):
        return list(content)
    pieces = content.split("<image>")
    parts = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return [part for part in parts if part.get("text") != ""] or parts[:1]


def _plain(messages, lm, tokenizer):
    """Without a template: a blank line ends other turns, eos the answers, as in `data.conversation`."""
    ids, learnt = list(tokenizer.lead_ids), [False] * len(tokenizer.lead_ids)
    for message in messages:
        is_answer = message["role"] == "assistant"
        new: list[int] = []
        for part in message["content"]:
            new += [lm.image_token] if part["type"] == "image" else list(tokenizer.encode(part["text"]))
        new += [tokenizer.eos_id] if is_answer else list(tokenizer.encode("\n\n"))
        ids += new
        learnt += [is_answer and message.get("weight", 1) != 0] * len(new)
    return ids, learnt


def template_messages(messages: list[Message], count: int, lm: VisionLM, tokenizer: typing.Any) -> list[Message]:
    """Returns messages in parts as the chat template reads them: so, or as texts with the image token's own text.

    `count` is the number of their pictures.
    """
    token = marked_token(tokenizer.text_of(lm.image_token))
    texts = [message | {"content": _joined(message["content"], token)} for message in messages]
    in_parts = [message if message["role"] == "user" else text for message, text in zip(messages, texts, strict=True)]
    if not count or token != tokenizer.text_of(lm.image_token):
        return texts
    try:
        rendered = tokenizer.chat(in_parts)
    except UserError:  # a template of texts refuses a list, or adds it to a text
        return texts
    return in_parts if rendered.count(token) == count and "'type'" not in rendered else texts


def marked_token(token: str) -> str:
    """Puts InternVL's marks around its image token, which its processor adds to what its template gives."""
    return f"<img>{token}</img>" if token == "<IMG_CONTEXT>" else token


def _joined(parts, token):
    return "".join(token if part["type"] == "image" else part["text"] for part in parts)
