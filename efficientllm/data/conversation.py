"""Conversation to tokens, with a loss mask: only the assistant's turns and their ends are trained on."""

import functools
import json
import logging
import typing

from efficientllm.data import assistant_spans
from efficientllm.errors import UserError

Message = dict[str, typing.Any]
log = logging.getLogger("efficientllm")


def dump(messages: list[Message], tools: list | None = None) -> str:
    """Serializes a conversation to JSON, the text of a document: `[{"role": ..., "content": ...}, ...]`.

    With `tools`, in transformers' format, it is `{"messages": ..., "tools": ...}`.
    """
    return json.dumps({"messages": messages, "tools": tools} if tools else messages, ensure_ascii=False)


def encode(tokenizer: typing.Any, text: str) -> tuple[list[int], list[bool]]:
    """Tokenizes a document that `dump` made, end token included, to `(ids, learnt)`.

    `learnt` is the loss mask, a bool for each token. An assistant turn with `"weight": 0` has no loss, as in OpenAI's
    format.

    With a chat template, the ids are those of transformers for the whole conversation, and the loss is on the
    assistant's turns (`data.assistant_spans`); eos is appended where the template ends without an end token. Without
    a template, a blank line ends other turns and eos ends the assistant's. Raises UserError where turns are not found.
    """
    document = json.loads(text)
    has_tools = isinstance(document, dict)
    messages, tools = (document["messages"], document["tools"]) if has_tools else (document, None)
    return _plain(tokenizer, messages) if tokenizer.chat is None else _templated(tokenizer, messages, tools)


def _plain(tokenizer, messages):
    ids, learnt = list(tokenizer.lead_ids), [False] * len(tokenizer.lead_ids)
    for message in messages:
        is_answer = message["role"] == "assistant"
        is_learnt = is_answer and message.get("weight", 1) != 0
        new = list(tokenizer.encode(message["content"] if is_answer else message["content"] + "\n\n"))
        new += [tokenizer.eos_id] if is_answer else []
        ids += new
        learnt += [is_learnt] * len(new)
    return ids, learnt


def _templated(tokenizer, messages, tools):
    text, spans = assistant_spans.find_spans(tokenizer, messages, tools)
    weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    if 0 in weights:
        if len(weights) != len(spans):
            raise UserError(
                f"{assistant_spans.describe(messages)}: the chat template marks other turns than the answers, of which "
                "one has weight = 0; drop the weight, or the marks"
            )
        spans = [span for span, weight in zip(spans, weights, strict=True) if weight != 0]
    if _drops_thinking(messages, text):
        _say_dropped(tokenizer.fingerprint)
    ids, offsets = tokenizer.encode_spans(text)
    learnt = _overlapping(offsets, [(start, end) for start, end in spans if start < end])
    if messages[-1]["role"] != "assistant":  # nothing is learnt of what follows the last answer
        count = max((index + 1 for index, is_learnt in enumerate(learnt) if is_learnt), default=0)
        return ids[:count], learnt[:count]
    if ids[-1] not in (tokenizer.eos_id, *tokenizer.end_ids):
        ids, learnt = [*ids, tokenizer.eos_id], [*learnt, weights[-1] != 0]
    return ids, learnt


def _drops_thinking(messages, text):
    """Returns whether the template drops the reasoning of the last answer."""
    last = next((message for message in reversed(messages) if message["role"] == "assistant"), {})
    before, _, _ = last.get("content", "").rpartition("</think>")
    thought = last.get("reasoning_content") or last.get("thinking") or before.partition("<think>")[2]
    return bool(thought.strip()) and thought.strip() not in text


@functools.cache
def _say_dropped(fingerprint):
    """Warns once for each tokenizer that its template drops reasoning."""
    log.warning("the chat template leaves out the thinking of answers, as in transformers: it is not learnt")


def _overlapping(offsets, spans):
    """Returns, for each token, whether its characters overlap one of `spans`, which are in order."""
    learnt, left = [], list(spans)
    for start, end in offsets:
        while left and start >= left[0][1]:
            left.pop(0)
        learnt.append(bool(left) and end > left[0][0])
    return learnt


def check(messages: typing.Any, where: str) -> list[Message]:
    """Checks that messages are a conversation with an answer, and returns them in transformers' format.

    Parts of text are joined, and keys without a value removed. Raises UserError that says what is wrong.
    """
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise UserError(f"{where}: a conversation is a list of {{'role': ..., 'content': ...}}, not {messages!r:.80}")
    messages = [_message(message, f"{where}, message {index}") for index, message in enumerate(messages)]
    if not any(message["role"] == "assistant" and _says(message) for message in messages):
        raise UserError(f"{where}: no message of the role 'assistant': there is nothing to learn; add an answer")
    return messages


def _message(message, where):
    message = _without_none(message)
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"{where}: 'content' must be a text or a list of parts of type 'text', not {content!r:.80}")
    try:
        json.dumps(message, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds a lone surrogate, half a character; take it out") from None
    return message | {"content": content}


def _is_text(part):
    return isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str))


def _says(message):
    return message.get("weight", 1) != 0 and bool(message["content"].strip() or message.get("tool_calls"))


def _without_none(value):
    """As readers of tables fill what a record does not have with None, which templates take for a value."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
