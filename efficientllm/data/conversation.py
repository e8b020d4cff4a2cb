"""A conversation as tokens, and which of them are to be learnt: what the assistant says, and where it ends."""

import json

from efficientllm.errors import UserError


def dump(messages):
    """A conversation as the text of a document: `[{"role": ..., "content": ...}, ...]` in JSON."""
    return json.dumps(messages, ensure_ascii=False)


def encode(tokenizer, text):
    """`(ids, learnt)` of a document that `dump` made, eos included; `learnt` has a bool a token.

    With a chat template, a turn of the assistant is what the template adds to the conversation before it and its
    opening of the turn. Without one, turns are set apart by a blank line and the assistant's end with eos.
    """
    ids = [] if tokenizer.chat else list(tokenizer.lead_ids)
    learnt = [False] * len(ids)
    for part, is_answer in _parts(tokenizer, json.loads(text)):
        new = part if isinstance(part, list) else tokenizer.encode(part)
        ids += new
        learnt += [is_answer] * len(new)
    return ids, learnt


def _parts(tokenizer, messages):
    """Texts, or lists of ids, in turn with whether they are to be learnt."""
    if tokenizer.chat is None:
        for message in messages:
            if message["role"] == "assistant":
                yield message["content"], True
                yield [tokenizer.eos_id], True
            else:
                yield message["content"] + "\n\n", False
        return
    before = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = tokenizer.chat(messages[:index], add_generation_prompt=True)
        closed = tokenizer.chat(messages[: index + 1])
        if not (opened.startswith(before) and closed.startswith(opened)):
            raise UserError("the tokenizer's chat template rewrites earlier turns: what it adds cannot be told apart")
        yield tokenizer.encode_template(opened[len(before) :]), False
        answer = tokenizer.encode_template(closed[len(opened) :].rstrip())
        yield answer if answer[-1:] == [tokenizer.eos_id] else [*answer, tokenizer.eos_id], True
        before = closed.rstrip()


def check(messages, where):
    """The messages, if they are a conversation with an answer. Raises UserError that says what is wrong."""
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise UserError(f"{where}: a conversation is a list of {{'role': ..., 'content': ...}}, not {messages!r:.80}")
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise UserError(f"{where}: no message of the role 'assistant': there is nothing to learn")
    return messages
