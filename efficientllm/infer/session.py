"""A conversation with a model: what is said as ids, answers as they grow, and the state kept from turn to turn."""

import time

import numpy as np

from efficientllm.infer.engine import PIECES, Engine

SHORTEST, LONGEST = 1024, 8192  # tokens of state at first, and at most where the model has no limit of its own
CHUNK = 8  # tokens between two looks at the clock and the keyboard


class Dialogue:
    """What has been said, as ids: through the chat template; as records are tuned on without one (`records`); else
    one text that goes on."""

    def __init__(self, tokenizer, system="", records=False):
        self.tokenizer, self.system = tokenizer, system
        self.form = "template" if tokenizer.chat else "records" if records else "text"
        self.end_ids = tuple(dict.fromkeys((*tokenizer.end_ids, *self._turn_end())))
        self.reset()

    def reset(self):
        """Forgets all but the system message."""
        self._turns = []

    def _turn_end(self):
        """The token with which the template closes a turn, which need not be one that ends a text."""
        if self.form != "template":
            return [self.tokenizer.eos_id]
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "zqxend"}]
        _, found, tail = self.tokenizer.chat(said).rpartition("zqxend")
        ids = self.tokenizer.encode_template(tail) if found else []
        return ids[:1] if ids and ids[0] in self.tokenizer.backend.get_added_tokens_decoder() else []

    def ask(self, text):
        """The ids of all that has been said and of `text`, up to where the answer begins. Raises UserError where the
        template refuses it."""
        self._turns.append([text, None, ()])
        try:
            return self.ids()
        except BaseException:
            self._turns.pop()
            raise

    def ids(self):
        """As `ask` gave them, of the turns that are left."""
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
        found = [*self.tokenizer.lead_ids, *(encode(self.system + "\n\n") if self.system else [])]
        for question, _, answer in self._turns:
            found += [*encode(question if is_text else question + "\n\n"), *answer]
            if not is_text and answer and answer[-1] not in self.end_ids:
                found.append(self.tokenizer.eos_id)
        return list(map(int, found))

    def answered(self, ids, text):
        """Keeps the answer to what was asked last."""
        if self.form == "text" and ids and ids[-1] in self.end_ids:
            ids = ids[:-1]  # the text goes on
        self._turns[-1][1:] = text, tuple(ids)

    def within(self, ids, room):
        """`(ids, turns dropped)`: as many of the newest turns as there is `room` for. Where there is none for what was
        asked last, that is forgotten, nothing else, and given is `(None, its tokens)`."""
        turns = list(self._turns)
        while len(ids) > room:
            if len(self._turns) == 1:
                self._turns = turns[:-1]
                return None, len(ids)
            del self._turns[0]
            ids = self.ids()
        return ids, len(turns) - len(self._turns)


class Session:
    """Answers of `lm` with `params`, one at a time; what has been read of a conversation is not read again."""

    def __init__(self, lm, params, sampler, end_ids, most=None):
        self.lm, self.params, self.sampler, self.end_ids = lm, params, sampler, end_ids
        self.most = most or LONGEST
        self._seed, self._engine, self._carry, self._read = 0, None, None, []
        self._fit(min(SHORTEST, self.most))

    @property
    def length(self):
        """Tokens that there is state for."""
        return self._engine.length

    def _fit(self, length):
        """An engine with state for `length` tokens or more: double what there was."""
        if self._engine is not None and length <= self._engine.length:
            return
        size = self._engine.length if self._engine else length
        while size < length:
            size *= 2
        self._carry, self._read = None, []
        self._engine = Engine(self.lm, self.params, self.sampler, self.end_ids, min(size, self.most), pieces=True)

    def warm_up(self):
        """Compiles what answers need."""
        prompt = [0] * min(sum(PIECES) + 1, self.length - 1)
        for _ in self.answer(prompt, 1):
            pass
        self._carry, self._read = None, []

    def answer(self, ids, new_tokens, stopped=lambda ids: False):
        """Yields the ids of the answer to `ids` so far, at most `new_tokens`; what ends it is in them.

        `stopped(ids)` ends it after any of them.
        """
        self._fit(len(ids) + new_tokens)
        carry, engine, found, done = self._begin(ids), self._engine, [], False
        at = int(carry.positions_B[0])
        while not done:
            carry, most = engine._cross(carry, np.array([at]), [[*ids, *found]])
            wanted = len(ids) - at + 1 if at <= len(ids) else CHUNK
            carry, new_1S = engine.decode(carry, [ids], min(wanted, len(ids) + new_tokens - at, most))
            after = int(carry.positions_B[0])
            found += np.asarray(new_1S)[0, max(0, len(ids) - at) : after - at].tolist()
            at = after
            self._carry, self._read = carry, [*ids, *found][:at]
            done = len(found) >= new_tokens or bool(found and found[-1] in self.end_ids)
            if found:
                yield list(found)
                done = done or stopped(found)

    def _begin(self, ids):
        """The carry after `ids`, of which what it has read before is not read again."""
        carry, read = self._carry, self._read
        self._carry, self._read, self._seed = None, [], self._seed + 1
        if carry is None or not self._engine.extends or ids[: len(read)] != read or len(ids) == len(read):
            carry = None
        return self._engine.prefill([ids], self._seed, carry=carry)


class Times:
    """Seconds to first tokens, and tokens and seconds after them, of all answers."""

    def __init__(self, clock=time.perf_counter):
        self._clock, self.first, self.tokens, self.seconds = clock, [], 0, 0.0

    def watched(self, answer):
        """Yields what `answer` does, and counts."""
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
