"""Chat sessions: a dialogue as token ids, replies streamed as they grow, and a KV cache reused between turns."""

import time
import typing
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from efficientllm.embeds.tokens import LM
from efficientllm.infer.engine import PREFILL_CHUNKS, Carry, Engine
from efficientllm.typing import Params

SHORTEST, LONGEST = 1024, 8192  # cache length at first, and its limit for models without one
CHUNK = 8  # decode steps between two checks whether the user interrupts


class Dialogue:
    """The turns of a conversation, encoded as one list of ids.

    `form` is `template` where the tokenizer has a chat template, else `records` for a model tuned on records (question,
    blank line, answer), else `text`: one text that continues.
    """

    def __init__(self, tokenizer: typing.Any, system: str = "", records: bool = False) -> None:
        self.tokenizer, self.system = tokenizer, system
        self.form = "template" if tokenizer.chat else "records" if records else "text"
        self.end_ids = tuple(dict.fromkeys((*tokenizer.end_ids, *self._turn_end())))
        self.reset()

    def reset(self) -> None:
        """Removes all turns; the system message stays."""
        self._turns: list[list] = []

    def _turn_end(self):
        """The token with which the template closes an assistant turn; it may differ from the end-of-text token."""
        if self.form != "template":
            return [self.tokenizer.eos_id]
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "zqxend"}]
        _, marker, tail = self.tokenizer.chat(messages).rpartition("zqxend")
        ids = self.tokenizer.encode_template(tail) if marker else []
        return ids[:1] if ids and ids[0] in self.tokenizer.backend.get_added_tokens_decoder() else []

    def ask(self, text: str) -> list[int]:
        """Adds a turn with the question `text` -> ids of the dialogue up to where the answer begins.

        Raises UserError where the template refuses the text.
        """
        self._turns.append([text, None, ()])
        try:
            return self.ids()
        except BaseException:
            self._turns.pop()
            raise

    def ids(self) -> list[int]:
        """The ids of the present turns, up to where the answer begins."""
        if self.form == "template":
            return self.tokenizer.encode_template(self.tokenizer.chat(self._messages(), add_generation_prompt=True))
        return self._plain()

    def _messages(self):
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer, _ in self._turns:
            messages.append({"role": "user", "content": question})
            messages += [] if answer is None else [{"role": "assistant", "content": answer}]
        return messages

    def _plain(self):
        is_text, encode = self.form == "text", self.tokenizer.encode
        ids = [*self.tokenizer.lead_ids, *(encode(self.system + "\n\n") if self.system else [])]
        for question, _, answer in self._turns:
            ids += [*encode(question if is_text else question + "\n\n"), *answer]
            if not is_text and answer and answer[-1] not in self.end_ids:
                ids.append(self.tokenizer.eos_id)
        return list(map(int, ids))

    def answered(self, ids: list[int], text: str) -> None:
        """Stores the answer to the last question."""
        if self.form == "text" and ids and ids[-1] in self.end_ids:
            ids = ids[:-1]  # the text goes on
        self._turns[-1][1:] = text, tuple(ids)

    def within(self, ids: list[int], room: int) -> tuple[list[int] | None, int]:
        """Drops the oldest turns until at most `room` ids are left -> `(ids, number of dropped turns)`.

        If the last question alone is longer, only that turn is dropped: `(None, its number of ids)`.
        """
        turns = list(self._turns)
        while len(ids) > room:
            if len(self._turns) == 1:
                self._turns = turns[:-1]
                return None, len(ids)
            del self._turns[0]
            ids = self.ids()
        return ids, len(turns) - len(self._turns)


class Session:
    """Generates one answer at a time; ids that were prefilled or generated before are not prefilled again."""

    def __init__(
        self, lm: LM, params: Params, sampler: typing.Any, end_ids: Sequence[int], most: int | None = None
    ) -> None:
        self.lm, self.params, self.sampler, self.end_ids = lm, params, sampler, end_ids
        self.most = most or LONGEST
        self._seed = 0
        self._engine: Engine | None = None
        self._carry: Carry | None = None
        self._cached: list[int] = []
        self._fit(min(SHORTEST, self.most))

    @property
    def length(self) -> int:
        """Cache length in tokens."""
        return self._engine.length

    def _fit(self, length):
        """Ensures an engine of cache length `length` or more, by doubling."""
        if self._engine is not None and length <= self._engine.length:
            return
        size = self._engine.length if self._engine else length
        while size < length:
            size *= 2
        self._carry, self._cached = None, []
        self._engine = Engine(self.lm, self.params, self.sampler, self.end_ids, min(size, self.most), chunked=True)

    def warm_up(self) -> None:
        """Compiles prefill and decode before the first question."""
        prompt = [0] * min(sum(PREFILL_CHUNKS) + 1, self.length - 1)
        for _ in self.answer(prompt, 1):
            pass
        self._carry, self._cached = None, []

    def answer(
        self, ids: list[int], new_tokens: int, stopped: Callable[[list[int]], bool] = lambda ids: False
    ) -> Iterator[list[int]]:
        """Yields the ids of the answer so far, at most `new_tokens`, the end token included.

        The answer also ends when `stopped(ids)` is True.
        """
        self._fit(len(ids) + new_tokens)
        carry, engine, done = self._begin(ids), self._engine, False
        new_ids: list[int] = []
        at = int(carry.positions_B[0])
        while not done:
            carry, limit = engine.switch_rope_scaling(carry, np.array([at]), [[*ids, *new_ids]])
            wanted = len(ids) - at + 1 if at <= len(ids) else CHUNK
            carry, new_1S = engine.decode(carry, [ids], min(wanted, len(ids) + new_tokens - at, limit))
            after = int(carry.positions_B[0])
            new_ids += np.asarray(new_1S)[0, max(0, len(ids) - at) : after - at].tolist()
            at = after
            self._carry, self._cached = carry, [*ids, *new_ids][:at]
            done = len(new_ids) >= new_tokens or bool(new_ids and new_ids[-1] in self.end_ids)
            if new_ids:
                yield list(new_ids)
                done = done or stopped(new_ids)

    def _begin(self, ids):
        """Prefills `ids`, from the cached carry where its ids are a prefix of them."""
        carry, cached = self._carry, self._cached
        self._carry, self._cached, self._seed = None, [], self._seed + 1
        if carry is None or not self._engine.extends or ids[: len(cached)] != cached or len(ids) == len(cached):
            carry = None
        return self._engine.prefill([ids], self._seed, carry=carry)


class Times:
    """Times of all answers: seconds to each first token, and the tokens and seconds after them."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self.tokens, self.seconds = clock, 0, 0.0
        self.first: list[float] = []

    def watched(self, answer: Iterator[list[int]]) -> Iterator[list[int]]:
        """Yields from `answer` and records its times."""
        begin, first, count = self._clock(), None, 0
        for ids in answer:
            if first is None:
                first = self._clock()
                self.first.append(first - begin)
            count = len(ids)
            now = self._clock()
            yield ids
        if count > 1:
            self.tokens += count - 1
            self.seconds += now - first

    def __str__(self):
        """`3 answers: TTFT 0.081 s, 42.1 tokens/s`; the TTFT is the median."""
        if not self.first:
            return "no answers"
        answers = f"{len(self.first)} answer{'s' * (len(self.first) > 1)}"
        rate = f", {self.tokens / self.seconds:,.1f} tokens/s" if self.seconds else ""
        return f"{answers}: TTFT {sorted(self.first)[len(self.first) // 2]:.3f} s{rate}"
