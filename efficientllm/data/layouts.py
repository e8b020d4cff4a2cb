"""Layouts of records that people have, told apart by their fields, and the conversation that each is.

| layout | fields |
|---|---|
| messages (OpenAI) | `messages`: `[{"role", "content"}]`; content may be a list of parts of type text; `tools` |
| ShareGPT | `conversations`: `[{"from", "value"}]`, with `system` |
| Alpaca | `instruction`, `input`, `output`, with `system` and `history` (pairs of earlier turns) |
| pairs | one of `PAIRS`, each side a text or a list of messages, with `system` and `context` |
"""

import dataclasses
import functools
import json
import typing

from efficientllm.data import conversation, tables
from efficientllm.errors import UserError

MESSAGES = ("messages", "conversations", "conversation")
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("input", "output"),
    ("user", "assistant"),
)
SYSTEM = ("system", "system_prompt")
BESIDE = ("input", "context")  # what an instruction or a question is about
TOOLS = "tools"
PREFERENCE = ("chosen", "rejected")
ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "bot": "assistant", "model": "assistant", "observation": "tool", "function_call": "assistant",
    "function_response": "tool",
}  # fmt: skip
KNOWN = (*ROLES, "user", "assistant", "system", "developer", "tool", "function")


class Skipped(Exception):
    """A record that teaches nothing; the message says why."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The fields that are read, and how a row of them becomes messages."""

    name: str
    fields: tuple
    messages: typing.Callable  # (row, where) -> messages

    @property
    def columns(self):
        """The fields, and that of the tools that a conversation may call, which need not be there."""
        return (*self.fields, TOOLS)

    def document(self, row, where):
        """The text of the conversation that a row is. Raises Skipped, UserError."""
        messages = self.messages(row, where)
        tools = row.get(TOOLS)
        if isinstance(tools, str):
            tools = _spelt(tools, TOOLS, where) if tools.strip() else None
        if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise UserError(f"{where}: field {TOOLS!r} holds {tools!r:.60}; it is a list of functions as JSON Schema")
        return conversation.dump(messages, tools)


def recognise(names, where, wanted=(), system=""):
    """The layout of rows with the fields `names`; `wanted` are those that the user names: (messages,) or (prompt,
    response), an empty string where the default is meant. Raises UserError that says what is missing."""
    names = list(names)
    if any(wanted):
        return _named(names, where, wanted, system)
    if key := next((key for key in MESSAGES if key in names), None):
        return _conversation(names, key, system)
    if pair := next((pair for pair in PAIRS if set(pair) <= set(names)), None):
        return _pair(names, *pair, system)
    if set(PREFERENCE) <= set(names):
        raise UserError(
            f"{where}: records of a chosen and a rejected answer; a run learns one answer a prompt: "
            "write pairs(path=..., response='chosen') to learn the chosen one (there is no preference tuning)"
        )
    common = [pair for pair in PAIRS if set(pair) & set(names)]
    close = f"; with {' or '.join(map(repr, sorted(set(sum(common, ())) - set(names))))} it would be" if common else ""
    raise UserError(
        f"{where}: no layout of a conversation is known with the fields {', '.join(names) or 'none'}{close}; "
        "name them: pairs(path=..., prompt='...', response='...') or chat(path=..., messages='...')"
    )


def _named(names, where, wanted, system):
    for name in filter(None, wanted):
        if name not in names:
            raise UserError(tables.missing(name, names, where))
    if len(wanted) == 1:
        return _conversation(names, wanted[0], system)
    prompt, response = wanted
    if not response:
        response = next((b for a, b in PAIRS if b in names and a in (prompt, "prompt") and b != prompt), None)
    if not response:
        raise UserError(f"{where}: no field of a response beside {prompt!r}; there are: {', '.join(names)}; name it")
    others = [a for a, b in PAIRS if a in names and a != response]
    return _pair(names, prompt or next(iter(others), ""), response, system)


def _conversation(names, key, system):
    beside = next((name for name in SYSTEM if name in names), None)
    fields = (key, beside) if beside else (key,)
    read = functools.partial(_read_conversation, key=key, beside=beside, system=system)
    return Layout(f"conversations in {key!r}" + (f" with {beside!r}" if beside else ""), fields, read)


def _read_conversation(row, where, key, beside, system):
    turns = row.get(key)
    if turns is None:
        raise Skipped("without a conversation")
    messages = _turns(_spelt(turns, key, where), "user", key, where)
    return _answered(_with_system(messages, row, beside, system, where), where)


def _spelt(turns, key, where):
    """The list of turns, which a table may hold as JSON."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: field {key!r} is not JSON ({str(error).partition(':')[0]})") from None
    if not isinstance(turns, list | tuple):
        wanted = "a conversation is a list of {'role': ..., 'content': ...}" if key != TOOLS else "it is a list"
        raise UserError(f"{where}: field {key!r} holds {turns!r:.60}; {wanted}")
    return turns


def _pair(names, prompt, response, system):
    alpaca = prompt in ("instruction", "question", "query")
    about = next((name for name in BESIDE if alpaca and name in names and name != response), None)
    beside = next((name for name in SYSTEM if name in names and name not in (prompt, response)), None)
    history = "history" if prompt == "instruction" and "history" in names else None
    fields = tuple(filter(None, (prompt, about, response, beside, history)))
    kind = "Alpaca's " if (prompt, response) == ("instruction", "output") else ""
    read = functools.partial(
        _read_pair, prompt=prompt, response=response, about=about, beside=beside, history=history, system=system
    )
    return Layout(f"{kind}{', '.join(map(repr, fields))}", fields, read)


def _read_pair(row, where, prompt, response, about, beside, history, system):
    answer = _turns(row.get(response), "assistant", response, where)
    if answer and next((turn["role"] for turn in answer if turn["role"] != "system"), "") == "user":
        messages = answer  # the whole conversation, as preference data often have it
    else:
        question = _turns(row.get(prompt), "user", prompt, where) if prompt else []
        context = tables.text(row.get(about), about, where) if about else None
        if context and context.strip() and question:
            question[-1] = {**question[-1], "content": f"{question[-1]['content']}\n{context}".strip()}
        if not question or not question[-1]["content"].strip():
            raise Skipped("without a prompt")
        messages = [*_earlier(row.get(history) if history else None, where), *question, *answer]
    return _answered(_with_system(messages, row, beside, system, where), where)


def _earlier(history, where):
    for turn in history or []:
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise UserError(
                f"{where}: field 'history' holds {turn!r:.60}; a turn is a list of a question and an answer"
            )
        yield {"role": "user", "content": turn[0]}
        yield {"role": "assistant", "content": turn[1]}


def _with_system(messages, row, beside, system, where):
    own = tables.text(row.get(beside), beside, where) if beside else None
    said = own if own and own.strip() else system
    if not said or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": said}, *messages]


def _answered(messages, where):
    if not any(message["role"] == "assistant" and _says(message) for message in messages):
        raise Skipped("without an answer")
    if any(message["content"] is None and not message.get("tool_calls") for message in messages):
        raise Skipped("with a turn of no text")
    return conversation.check(messages, where)


def _says(message):
    return bool((message["content"] or "").strip() or message.get("tool_calls"))


def _turns(value, role, name, where):
    """The messages that a field holds: a text is one of `role`, null is none."""
    if not isinstance(value, list | tuple):
        said = tables.text(value, name, where)
        return [] if said is None else [{"role": role, "content": said}]
    return [_turn(turn, f"{where}: field {name!r}, turn {index}") for index, turn in enumerate(value, 1)]


def _turn(turn, where):
    speaker = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if not isinstance(speaker, str):
        raise UserError(
            f"{where} is {turn!r:.80}; a turn is {{'role': ..., 'content': ...}} or {{'from': ..., 'value': ...}}"
        )
    content = turn["content"] if "content" in turn else turn.get("value")
    role = ROLES.get(speaker.lower(), speaker)
    if "role" not in turn and role not in KNOWN:
        raise UserError(f"{where} is from {speaker!r}; known: {', '.join(KNOWN)}")
    others = {key: item for key, item in turn.items() if key not in ("role", "content", "from", "value")}
    return {"role": role, "content": _content(content, where), **_filled(others)}


def _content(content, where):
    if isinstance(content, list | tuple):
        for part in content:
            if not isinstance(part, str) and not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise UserError(f"{where} has content of type {kind!r}; only text can be learnt")
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    return tables.text(content, "content", where)


def _filled(others):
    """Without what is null: columns of a table give every turn every key."""
    return {key: item for key, item in others.items() if item is not None}
