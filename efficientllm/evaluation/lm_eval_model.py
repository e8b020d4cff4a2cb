"""Model interface of the lm-evaluation-harness. It needs lm-eval and no torch.

Tokenization, truncation and scoring follow the harness's own transformers backend, so that scores can be compared.
"""

import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from efficientllm.embeds.tokens import LM, read_out
from efficientllm.errors import UserError
from efficientllm.infer.engine import Engine
from efficientllm.infer.samplers import Greedy, Sample
from efficientllm.infer.streaming import cut
from efficientllm.ops.attention import Context

READ_OUT = 64  # positions per chunk of logits
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Harness(TemplateLM):
    """Answers the harness's requests with a model, `batch_size` at a time.

    `lm` is not scanned (`scan=False`). `max_length` is the largest number of tokens in a row: longer contexts lose
    their start.
    """

    def __init__(
        self,
        lm: LM,
        params: typing.Any,
        tokenizer: typing.Any,
        max_length: int,
        batch_size: int = 8,
        seed: int = 0,
    ):
        super().__init__()
        self.lm, self.params, self.own_tokenizer, self.batch_size, self.seed = lm, params, tokenizer, batch_size, seed
        self.max_length, self.max_gen_toks = max_length, 256
        self._score = jax.jit(lambda *arguments: _score(lm, *arguments))

    @property
    def eot_token_id(self) -> int:
        return self.own_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text without context."""
        bos_id = getattr(self.own_tokenizer, "bos_id", None)
        return self.own_tokenizer.eos_id if bos_id is None else bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.own_tokenizer.fingerprint

    def chat_template(self, chat_template: typing.Any = False) -> str | None:
        """The template's text, which the harness stores in results.json."""
        return getattr(self.own_tokenizer, "template", "") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        return self.own_tokenizer.chat(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: typing.Any) -> list[int]:
        return self.own_tokenizer.encode_context(string, add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        """Scores `(texts, context ids, continuation ids)`: `[(log-likelihood, whether it is greedy)]`."""
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]))
        results = [None] * len(rows)
        for first in tqdm(range(0, len(rows), self.batch_size), "log-likelihoods", disable=disable_tqdm):
            indices = order[first : first + self.batch_size]
            for index, result in zip(indices, self._scores([rows[index] for index in indices]), strict=True):
                results[index] = result
                if (texts := requests[index][0]) is not None:  # a window of a longer text has none
                    self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _row(self, context, continuation):
        """`(input ids, target ids)` of a row. The targets are predicted at the last inputs."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"a context of {len(context)} and a continuation of {len(continuation)} tokens cannot be scored: "
                f"needed are one token and 1 to {self.max_length}, the positions of the model"
            )
        return (context + continuation)[-(self.max_length + 1) :][:-1], continuation

    def _scores(self, rows):
        # Lengths are rounded up to powers of two, and short batches are padded: few programs are compiled.
        T = min(self.max_length, _bucket(max(len(ids) for ids, _ in rows)))
        C = _bucket(max(len(scored) for _, scored in rows), 8)
        tokens_BT, where_BC = np.zeros((self.batch_size, T), np.int32), np.zeros((self.batch_size, C), np.int32)
        targets_BC = np.full((self.batch_size, C), -1, np.int32)
        for row, (ids, scored) in enumerate(rows):
            tokens_BT[row, : len(ids)] = ids
            where_BC[row, : len(scored)] = np.arange(len(ids) - len(scored), len(ids))
            targets_BC[row, : len(scored)] = scored
        sums_B, greedy_B = self._score(self.params, tokens_BT, where_BC, targets_BC)
        scores = zip(np.asarray(sums_B).tolist(), np.asarray(greedy_B).tolist(), strict=True)
        return list(scores)[: len(rows)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts. Every token is scored once, with the longest context that fits."""
        windows: list[tuple] = []
        owners: list[int] = []  # the index of each window's request
        for index, (text,) in enumerate(request.args for request in requests):
            spans = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += [(None, *utils.make_disjoint_window(span)) for span in spans]
            owners += [index] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions up to a stop string or the end of text. Requests of equal settings share batches."""
        groups: dict[str, list[int]] = {}
        completions = [""] * len(requests)
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as bar:
            for group in groups.values():
                for index, text in self._completions(requests, group):
                    completions[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update()
        return completions

    def _completions(self, requests, group):
        """Yields `(index, completion)` for the indices `group` of requests, whose settings are equal."""
        settings = normalize_gen_kwargs(requests[group[0]].args[1], self.max_gen_toks)
        new, stops = settings.pop("max_gen_toks"), [text for text in settings.pop("until", []) if text]
        if new >= self.max_length:
            raise UserError(f"a task generates {new} tokens; the model has {self.max_length} positions in all")
        prompts = {index: self._prompt(requests[index], self.max_length - new) for index in group}
        group = sorted(group, key=lambda index: -len(prompts[index]))
        length = min(self.max_length, _bucket(len(prompts[group[0]]) + new))
        engine = self._engine([requests[index] for index in group], _sampler(settings), length)
        reach = (
            4 * max(map(len, stops), default=0) + 4
        )  # more tokens than a stop string has: up to four bytes a character

        def stopped(ids):
            return any(stop in self.own_tokenizer.decode(ids[-reach:]) for stop in stops)

        for first in range(0, len(group), self.batch_size):
            indices = group[first : first + self.batch_size]
            *_, completions = engine.generate([prompts[index] for index in indices], new, self.seed, 16, stopped, first)
            for index, ids in zip(indices, completions, strict=True):
                yield index, cut(self.own_tokenizer.decode(ids), stops)

    def _prompt(self, request, most):
        """The ids of a request to generate from, the last `most` of them."""
        return self.tok_encode(request.args[0])[-most:]

    def _engine(self, requests, sampler, length):
        """The engine that answers requests, in their order."""
        return Engine(self.lm, self.params, sampler, self.own_tokenizer.end_ids, length, chunked=True)


def _sampler(settings):
    if not settings.get("do_sample"):
        return Greedy()
    return Sample(**{"top_k": 50} | {key: settings[key] for key in SAMPLED if key in settings})  # as transformers


def _bucket(count, least=32):
    """The next power of two, so that few programs are compiled for many lengths."""
    return max(least, 2 ** math.ceil(math.log2(count)))


def _score(lm, params, tokens_BT, where_BC, targets_BC):
    """`(sum of log-likelihoods [B], whether all targets are the likeliest tokens [B])`.

    `targets_BC` are predicted at the positions `where_BC`; -1 is no target. Padding is at the end of a row, in a
    segment of its own: no token attends to it, and experts do not count it.
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    last_B1 = jnp.max(jnp.where(targets_BC >= 0, where_BC, -1), 1, keepdims=True)
    segments_BT = (positions_BT <= last_B1).astype(jnp.int32)
    ctx = Context.packed(positions_BT, segments_BT).replace(reach_B=jnp.max(where_BC, 1) + 1)
    x_BTD, _, _ = lm.apply({"params": params}, tokens_BT, ctx, readout=False)
    x_BCD = jnp.take_along_axis(x_BTD, where_BC[..., None], 1)
    size = min(READ_OUT, where_BC.shape[1])

    # Chunks of C, because logits of all positions do not fit: 1.2 GB per row of 2,048 at a vocabulary of 150,000.
    def score_chunk(chunk):
        x_BcD, targets_Bc = chunk
        logits_BcV = read_out(lm, params, x_BcD)
        logp_BcV = jax.nn.log_softmax(logits_BcV)
        scored_Bc = targets_Bc >= 0
        values_Bc = jnp.take_along_axis(logp_BcV, jnp.maximum(targets_Bc, 0)[..., None], -1)[..., 0]
        likeliest_Bc = jnp.argmax(logits_BcV, -1) == targets_Bc
        return jnp.sum(values_Bc * scored_Bc, -1), jnp.all(likeliest_Bc | ~scored_Bc, -1)

    def chunks(a):  # [B, C, ...] -> [C / c, B, c, ...]
        return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)

    sums, greedy = jax.lax.map(score_chunk, (chunks(x_BCD), chunks(targets_BC)))
    return jnp.sum(sums, 0), jnp.all(greedy, 0)
