"""Assistant spans: finds the assistant's turns in a conversation that a chat template has rendered.

A template may mark them itself, by `{% generation %}`, as TRL's assistant_only_loss reads. Otherwise a turn is what the
template adds to the conversation before it and its header of the turn (the generation prompt). The rendered prefix may
not be a prefix of the full text, because earlier turns lose their thinking, or the header ends in `<think>`, or eos
closes the last turn alone. Then one message is replaced by a placeholder and the conversation rendered again; the text
around the placeholder gives the turn's start and end. Each position is checked against the full text. A conversation
whose turns cannot be told apart is refused.
"""

import itertools
import typing

from efficientllm.errors import UserError

Message = dict[str, typing.Any]
_WORD = "zqx{}xqz"


def find_spans(
    tokenizer: typing.Any, messages: list[Message], tools: list | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation and finds its assistant turns: `(text, [(start, end)])`, in characters.

    The text has no white space at its end. Raises UserError where the turns cannot be told from the rest.
    """
    template_options = {"tools": tools} if tools else {}
    marked = tokenizer.marked(messages, **template_options)
    if marked is not None:
        text, spans = marked
        if not spans:
            raise UserError(
                f"{describe(messages)}: the chat template's {{% generation %}} marks no turn; put it around answers"
            )
    else:
        turns = _Turns(tokenizer, messages, template_options)
        text, spans = turns.rendered, turns.spans()
    end = len(text.rstrip())
    return text[:end], [(min(first, end), min(last, end)) for first, last in spans]


class _Turns:
    """The assistant turns of `messages`, which the template renders as `rendered`."""

    def __init__(self, tokenizer, messages, template_options):
        self._tokenizer, self._messages, self._template_options = tokenizer, messages, template_options
        self._answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        self._opened = {index: self._opening(index) for index in self._answers}
        self.rendered = self._chat(messages)
        number = 0
        while _WORD.format(number) in self.rendered:
            number += 1
        self._word, self._other = _WORD.format(number), _WORD.format(f"{number}a")

    def _opening(self, index):
        """The conversation before an answer with the template's opening of it; None where there is none before."""
        return self._chat(self._messages[:index], add_generation_prompt=True) if index else None

    def spans(self):
        """`[(start, end)]` of the turns, in order."""
        spans, before = [], 0
        for index in self._answers:
            start, end = self._turn(index)
            if end < start and not self.rendered[end:start].strip():  # white space alone, or nothing
                end = start
            if not before <= start <= end:
                raise self._lost(index)
            spans.append((start, end))
            before = end
        return spans

    def _turn(self, index):
        opened, closed = self._opened[index], self._chat(self._messages[: index + 1])
        is_prefix = opened is not None and closed.startswith(opened) and self.rendered.startswith(closed.rstrip())
        if is_prefix and len(closed.rstrip()) > len(opened):
            return len(opened), len(closed.rstrip())
        return self._start(index, opened), self._end(index)

    def _start(self, index, opened):
        """Start of the turn's content: the position after the template's turn header."""
        if index and (place := self._behind_opening(index)) is not None:
            return place
        if opened is not None and self.rendered.startswith(opened):
            return len(opened)
        changed = self._with_word(index)  # a turn that nothing opens begins with its content
        if changed is None or not self.rendered.startswith(changed[0][: changed[1] - len(self._word)]):
            raise self._lost(index)
        return changed[1] - len(self._word)

    def _behind_opening(self, index):
        """Like `_start`, if the previous message occurs in both renderings; None otherwise.

        The answer's own text does not count as its header.
        """
        changed = self._with_word(index - 1)
        tail = self._after_word(self._replaced(index - 1)[:index], add_generation_prompt=True)
        if changed is None or tail is None or not self.rendered.startswith(changed[0][: changed[1] - len(self._word)]):
            return None
        rest = changed[0][changed[1] :]
        both = self._replaced(index - 1)
        both[index] = both[index] | {"content": self._other}
        replaced_tail = self._after_word(both)
        shown = replaced_tail is not None and self._other in replaced_tail
        return self._from_end(
            rest, self._common(tail, replaced_tail[: replaced_tail.index(self._other)] if shown else rest)
        )

    def _end(self, index):
        """Behind what the template closes the turn with, white space aside."""
        if index == len(self._messages) - 1:
            return len(self.rendered.rstrip())
        changed = self._with_word(index)
        tail = self._after_word(self._replaced(index)[: index + 1])
        if changed is None or tail is None:
            raise self._lost(index)
        rest = changed[0][changed[1] :]
        count = self._common(tail, rest)
        place = self._from_end(rest, len(rest[:count].rstrip()))
        if place is None:
            raise self._lost(index)
        return place

    def _from_end(self, rest, count):
        """Position after `count` characters of `rest` in the full text; None if the two end differently."""
        return len(self.rendered) - len(rest) + count if self.rendered.endswith(rest[count:]) else None

    def _common(self, tail, rest):
        """Length of the common prefix in whole tokens, so that a shared `<|` of two different tokens does not count."""
        if rest.startswith(tail):
            return len(tail)
        (ids, _), (others, offsets) = self._tokenizer.encode_spans(tail), self._tokenizer.encode_spans(rest)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False))
        count = len(list(same))
        return offsets[count - 1][1] if count else 0

    def _replaced(self, index):
        """The messages with our word as the content of one."""
        messages = list(self._messages)
        messages[index] = messages[index] | {"content": self._word}
        return messages

    def _with_word(self, index):
        """`(text, where our word ends)` with the word in the place of a message; None where it is not there once."""
        text = self._chat(self._replaced(index))
        return (text, text.index(self._word) + len(self._word)) if text.count(self._word) == 1 else None

    def _after_word(self, messages, **options):
        _, word, tail = self._chat(messages, **options).rpartition(self._word)
        return tail if word else None

    def _chat(self, messages, **options):
        return self._tokenizer.chat(messages, **self._template_options, **options)

    def _lost(self, index):
        return UserError(
            f"{describe(self._messages)}: the chat template renders the answer of message {index} so that it cannot be "
            "told apart from the rest; take a template with {% generation %} around answers"
        )


def describe(messages: list[Message]) -> str:
    """Says of which conversation a message is about: its length and its beginning."""
    content = messages[0].get("content") if messages else ""
    return f"a conversation of {len(messages)} messages that begins {content!r:.60}"
