"""The lm-evaluation-harness's model interface over our models; needs lm-eval, and no torch.

Texts become ids, are cut and are scored as by the harness's own transformers backend, so that numbers can be compared.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from efficientllm import model as models
from efficientllm.errors import UserError
from efficientllm.infer.engine import Engine
from efficientllm.infer.samplers import Greedy, Sample
from efficientllm.infer.streaming import cut
from efficientllm.ops.attention import Context

READ_OUT = 64  # positions whose logits exist at a time
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Harness(TemplateLM):
    """`lm` (its layers apart) with `params` and `tokenizer`, answering the harness's requests `batch_size` at a time.

    `max_length` is the most tokens of a row: longer contexts lose their start.
    """

    def __init__(self, lm, params, tokenizer, max_length, batch_size=8, seed=0):
        super().__init__()
        self.lm, self.params, self.ours, self.batch_size, self.seed = lm, params, tokenizer, batch_size, seed
        self.max_length, self.max_gen_toks = max_length, 256
        self._score = jax.jit(lambda *arguments: _score(lm, *arguments))

    @property
    def eot_token_id(self):
        return self.ours.eos_id

    @property
    def prefix_token_id(self):
        """What stands before a text that has no context."""
        bos_id = getattr(self.ours, "bos_id", None)
        return self.ours.eos_id if bos_id is None else bos_id

    @property
    def tokenizer_name(self):
        return self.ours.fingerprint

    def chat_template(self, chat_template=False):
        """The template's text, which results.json keeps."""
        return getattr(self.ours, "template", "") if chat_template else None

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        how = {"add_generation_prompt": add_generation_prompt}
        return self.ours.chat(chat_history, **how, continue_final_message=not add_generation_prompt)

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.ours.encode_context(string, add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        """`[(log-likelihood, whether greedy decoding would give it)]` of `(texts, context ids, continuation ids)`."""
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]))
        found = [None] * len(rows)
        for first in tqdm(range(0, len(rows), self.batch_size), "log-likelihoods", disable=disable_tqdm):
            who = order[first : first + self.batch_size]
            for index, result in zip(who, self._scores([rows[index] for index in who]), strict=True):
                found[index] = result
                if (texts := requests[index][0]) is not None:  # a window of a longer text has none
                    self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    def _row(self, context, continuation):
        """`(ids that are read, ids that are scored)`."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"a context of {len(context)} and a continuation of {len(continuation)} tokens cannot be scored: "
                f"needed are one token and 1 to {self.max_length}, the positions of the model"
            )
        return (context + continuation)[-(self.max_length + 1) :][:-1], continuation

    def _scores(self, rows):
        T = min(self.max_length, _bucket(max(len(ids) for ids, _ in rows)))
        C = _bucket(max(len(scored) for _, scored in rows), 8)
        tokens_BT, where_BC = np.zeros((self.batch_size, T), np.int32), np.zeros((self.batch_size, C), np.int32)
        targets_BC = np.full((self.batch_size, C), -1, np.int32)
        for row, (ids, scored) in enumerate(rows):
            tokens_BT[row, : len(ids)] = ids
            where_BC[row, : len(scored)] = np.arange(len(ids) - len(scored), len(ids))
            targets_BC[row, : len(scored)] = scored
        sums_B, greedy_B = self._score(self.params, tokens_BT, where_BC, targets_BC)
        found = zip(np.asarray(sums_B).tolist(), np.asarray(greedy_B).tolist(), strict=True)
        return list(found)[: len(rows)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-likelihoods of whole texts: each token is scored once, after as many as there is room for."""
        windows, owners = [], []
        for index, (text,) in enumerate(request.args for request in requests):
            parts = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += [(None, *utils.make_disjoint_window(part)) for part in parts]
            owners += [index] * (len(windows) - len(owners))
        found = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            found[owner] += value
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def generate_until(self, requests, disable_tqdm=False):
        """Texts up to a stop string or the end of text; requests of equal settings are generated together."""
        groups, found = {}, [None] * len(requests)
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as bar:
            for group in groups.values():
                for index, text in self._answers(requests, group):
                    found[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update()
        return found

    def _answers(self, requests, group):
        """Yields `(index, text)` of requests of equal settings."""
        settings = normalize_gen_kwargs(requests[group[0]].args[1], self.max_gen_toks)
        new, stops = settings.pop("max_gen_toks"), [text for text in settings.pop("until", []) if text]
        if new >= self.max_length:
            raise UserError(f"a task generates {new} tokens; the model has {self.max_length} positions in all")
        prompts = {index: self.tok_encode(requests[index].args[0])[-(self.max_length - new) :] for index in group}
        group = sorted(group, key=lambda index: -len(prompts[index]))
        length = min(self.max_length, _bucket(len(prompts[group[0]]) + new))
        engine = Engine(self.lm, self.params, _sampler(settings), self.ours.end_ids, length, pieces=True)
        reach = 4 * max(map(len, stops), default=0) + 4  # tokens that can hold a stop

        def stopped(ids):
            return any(stop in self.ours.decode(ids[-reach:]) for stop in stops)

        for first in range(0, len(group), self.batch_size):
            who = group[first : first + self.batch_size]
            *_, answers = engine.generate([prompts[index] for index in who], new, self.seed, 16, stopped, first)
            for index, ids in zip(who, answers, strict=True):
                yield index, cut(self.ours.decode(ids), stops)


def _sampler(settings):
    if not settings.get("do_sample"):
        return Greedy()
    return Sample(**{"top_k": 50} | {key: settings[key] for key in SAMPLED if key in settings})  # as transformers


def _bucket(count, least=32):
    """The next power of two: few programs are compiled for many lengths."""
    return max(least, 2 ** math.ceil(math.log2(count)))


def _score(lm, params, tokens_BT, where_BC, targets_BC):
    """`(sum of log-likelihoods [B], whether all are the likeliest [B])` of `targets`, read out at `where`; -1 is none.

    What is padded stands behind, is seen by nothing and takes no expert's place. Logits of all positions at once would
    not fit: a vocabulary of 150,000 takes 1.2 GB a row of 2,048.
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    last_B1 = jnp.max(jnp.where(targets_BC >= 0, where_BC, -1), 1, keepdims=True)
    segments_BT = (positions_BT <= last_B1).astype(jnp.int32)
    ctx = Context.packed(positions_BT, segments_BT).replace(reach_B=jnp.max(where_BC, 1) + 1)
    x_BTD, _, _ = lm.apply({"params": params}, tokens_BT, ctx, readout=False)
    x_BCD = jnp.take_along_axis(x_BTD, where_BC[..., None], 1)
    size = min(READ_OUT, where_BC.shape[1])

    def part(piece):
        x_BcD, targets_Bc = piece
        logits_BcV = models.read_out(lm, params, x_BcD)
        logp_BcV = jax.nn.log_softmax(logits_BcV)
        scored_Bc = targets_Bc >= 0
        values_Bc = jnp.take_along_axis(logp_BcV, jnp.maximum(targets_Bc, 0)[..., None], -1)[..., 0]
        likeliest_Bc = jnp.argmax(logits_BcV, -1) == targets_Bc
        return jnp.sum(values_Bc * scored_Bc, -1), jnp.all(likeliest_Bc | ~scored_Bc, -1)

    split = lambda a: jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)  # noqa: E731
    sums, greedy = jax.lax.map(part, (split(x_BCD), split(targets_BC)))
    return jnp.sum(sums, 0), jnp.all(greedy, 0)
