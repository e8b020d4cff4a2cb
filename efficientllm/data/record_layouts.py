"""Record layouts: recognises the layout of instruction and chat data by its fields, and converts it to messages.

| layout | fields |
|---|---|
| messages (OpenAI) | `messages`: `[{"role", "content"}]`; content may be a list of parts of type text; `tools` |
| ShareGPT | `conversations`: `[{"from", "value"}]`, with `system` |
| Alpaca | `instruction`, `input`, `output`, with `system` and `history` (pairs of earlier turns) |
| pairs | one of `PAIRS`, each side a text or a list of messages, with `system` and `context` |
"""

import dataclasses
import functools
import typing

from efficientllm.data import conversation, row_readers
from efficientllm.data.messages import Skipped, as_list, messages_of
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
LABEL = "label"  # of a completion: whether it is one to learn (KTO: arXiv:2402.01306)
TOOLS = "tools"
PREFERENCE = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The fields that are read, and how a row of them becomes messages."""

    name: str
    fields: tuple
    messages: typing.Callable  # (row, where) -> messages

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields, and the optional one of the tools that a conversation may call."""
        return (*self.fields, TOOLS)

    def document(self, row: dict, where: str) -> str:
        """Converts a row to the text of a conversation. Raises Skipped for one to pass over, else UserError."""
        messages = self.messages(row, where)
        tools = row.get(TOOLS)
        if isinstance(tools, str):
            tools = as_list(tools, TOOLS, where, "it is a list") if tools.strip() else None
        if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise UserError(f"{where}: field {TOOLS!r} holds {tools!r:.60}; it is a list of functions as JSON Schema")
        return conversation.dump(messages, tools)


def recognise(names: typing.Iterable[str], where: str, wanted: tuple[str, ...] = (), system: str = "") -> Layout:
    """Recognizes the layout of rows by their fields `names`.

    `wanted` are the fields that the user names, (messages,) or (prompt, response), an empty string for the default.
    `system` is the system message of conversations without one. Raises UserError that says what is missing.
    """
    names = Names(names)
    if any(wanted):
        return _named(names, where, wanted, system)
    if key := names.first(MESSAGES):
        return _conversation(names, key, system)
    if pair := next((pair for pair in PAIRS if all(map(names.first, pair))), None):
        return _pair(names, *map(names.first, pair), system)
    if all(map(names.first, PREFERENCE)):
        raise UserError(
            f"{where}: records of a chosen and a rejected answer; a run learns one answer a prompt: "
            "write pairs(path=..., response='chosen') to learn the chosen one (there is no preference tuning)"
        )
    common = [pair for pair in PAIRS if any(map(names.first, pair))]
    others = sorted(name for name in set(sum(common, ())) if not names.first(name))
    close = f"; with {' or '.join(map(repr, others))} it would be" if common else ""
    raise UserError(
        f"{where}: no layout of a conversation is known with the fields {', '.join(names) or 'none'}{close}; "
        "name them: pairs(path=..., prompt='...', response='...') or chat(path=..., messages='...')"
    )


class Names(tuple):
    """Field names, looked up without regard to case."""

    def first(self, wanted: str | typing.Iterable[str]) -> str | None:
        """Returns the field that matches the first of `wanted` (a name or several) to be there, or None."""
        originals = {name.lower().strip(): name for name in reversed(self)}
        candidates = (wanted,) if isinstance(wanted, str) else wanted
        return next((originals[name] for name in candidates if name in originals), None)

    def beside(self, wanted: str | typing.Iterable[str], *taken: str) -> str | None:
        """Returns `first` among the names that are not in `taken`."""
        return Names(name for name in self if name not in taken).first(wanted)


def _named(names, where, wanted, system):
    for name in filter(None, wanted):
        if name not in names:
            raise UserError(row_readers.missing_field(name, names, where))
    if len(wanted) == 1:
        return _conversation(names, wanted[0], system)
    prompt, response = wanted
    response = response or names.beside([b for a, b in PAIRS if a in (prompt.lower(), "prompt")], prompt)
    if not response:
        raise UserError(f"{where}: no field of a response beside {prompt!r}; name one of {', '.join(names)}")
    return _pair(names, prompt or names.beside([a for a, _ in PAIRS], response) or "", response, system)


def _conversation(names, key, system):
    beside = names.beside(SYSTEM, key)
    fields = (key, beside) if beside else (key,)
    read = functools.partial(_read_conversation, key=key, beside=beside, system=system)
    return Layout(f"conversations in {key!r}" + (f" with {beside!r}" if beside else ""), fields, read)


def _read_conversation(row, where, key, beside, system):
    turns = row.get(key)
    if turns is None:
        raise Skipped("without a conversation")
    messages = messages_of(as_list(turns, key, where), "user", key, where)
    return _answered(_with_system(messages, row, beside, system, where), where)


def _pair(names, prompt, response, system):
    instructs = prompt.lower() in ("instruction", "question", "query")
    about = names.beside(BESIDE, prompt, response) if instructs else None
    beside = names.beside(SYSTEM, prompt, response)
    history = names.beside("history", prompt, response) if instructs else None
    label = names.beside(LABEL, prompt, response) if response.lower() == "completion" else None
    fields = tuple(filter(None, (prompt, about, response, beside, history, label)))
    kind = "Alpaca's " if (prompt.lower(), response.lower()) == ("instruction", "output") else ""
    read = functools.partial(_read_pair, fields=(prompt, response, about, beside, history, label), system=system)
    return Layout(f"{kind}{', '.join(map(repr, fields))}", fields, read)


def _read_pair(row, where, fields, system):
    prompt, response, about, beside, history, label = fields
    if label and row.get(label) in (False, "False", "false"):
        raise Skipped("labelled as answers that are not wanted")
    answer = messages_of(row.get(response), "assistant", response, where)
    if answer and next((turn["role"] for turn in answer if turn["role"] != "system"), "") == "user":
        messages = answer  # the whole conversation, as preference data often have it
    else:
        question = messages_of(row.get(prompt), "user", prompt, where) if prompt else []
        context = row_readers.check_text(row.get(about), about, where) if about else None
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
    row_system = row_readers.check_text(row.get(beside), beside, where) if beside else None
    content = row_system if row_system and row_system.strip() else system
    if not content or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": content}, *messages]


def _answered(messages, where):
    if not any(message["role"] == "assistant" and _says(message) for message in messages):
        raise Skipped("without an answer")
    if any(message["content"] is None and not message.get("tool_calls") for message in messages):
        raise Skipped("with a turn of no text")
    return conversation.check(messages, where)


def _says(message):
    return message.get("weight", 1) != 0 and bool((message["content"] or "").strip() or message.get("tool_calls"))
