"""Chat messages of a record's field, normalized from the spellings in use (OpenAI, ShareGPT, dialogues as text)."""

import json
import re
import typing

from efficientllm.data import row_readers
from efficientllm.errors import UserError

ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "bot": "assistant", "model": "assistant", "observation": "tool", "function_call": "assistant",
    "function_response": "tool",
}  # fmt: skip
ROLES |= {role: role for role in ("user", "assistant", "system", "developer", "tool", "function")}
_DIALOGUE = re.compile(r"\n\n(Human|Assistant): ?")


class Skipped(Exception):
    """A record that teaches nothing; the message says why."""


def messages_of(value: typing.Any, role: str, name: str, where: str) -> list[dict]:
    """Returns the messages of a field: a text is one message of `role`, null is none. Raises UserError."""
    if not isinstance(value, list | tuple):
        text = row_readers.check_text(value, name, where)
        return [] if text is None else _dialogue(text) or [{"role": role, "content": text}]
    return [_turn(turn, f"{where}: field {name!r}, turn {index}") for index, turn in enumerate(value, 1)]


def _dialogue(text):
    """The turns of a text that is a whole dialogue (Bai et al. 2022, arXiv:2204.05862); none of any other."""
    if not text.startswith("\n\nHuman:") or "\n\nAssistant:" not in text:
        return []
    _, *turns = _DIALOGUE.split(text)  # speaker, content, speaker, content, ...
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": ROLES[speaker.lower()], "content": content.strip()} for speaker, content in pairs]


def as_list(
    value: typing.Any,
    key: str,
    where: str,
    wanted: str = "a conversation is a list of {'role': ..., 'content': ...}",
) -> list | tuple:
    """Returns the list of a field, parsed where a table holds it as JSON text. Raises UserError for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: field {key!r} is not JSON ({str(error).partition(':')[0]}); {wanted}") from None
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: field {key!r} holds {value!r:.60}; {wanted}")
    return value


def _turn(turn, where):
    speaker = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or not {"content", "value", "tool_calls"} & set(turn):
        raise UserError(
            f"{where}: is {turn!r:.80}; a turn is {{'role': ..., 'content': ...}} or {{'from': ..., 'value': ...}}"
        )
    if turn.get("weight") not in (None, 0, 1):
        raise UserError(f"{where}: weight = {turn['weight']!r}; 1 is learnt, 0 is not")
    content = turn["content"] if "content" in turn else turn.get("value")
    role = ROLES.get(speaker.lower())
    if role is None and "role" not in turn:
        raise UserError(f"{where}: is from {speaker!r}; known: {', '.join(ROLES)}")
    others = {key: item for key, item in turn.items() if key not in ("role", "content", "from", "value")}
    return {"role": role or speaker, "content": _content(content, where), **_filled(others)}


def _content(content, where):
    if isinstance(content, list | tuple):
        for part in content:
            if not isinstance(part, str) and not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise UserError(f"{where}: has content of type {kind!r}; only text can be learnt")
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    return row_readers.check_text(content, "content", where)


def _filled(others):
    """Without what is null: columns of a table give every turn every key."""
    return {key: item for key, item in others.items() if item is not None}
