"""Inference: from a checkpoint to generated text, prefill and decoding measured apart, quality, and a row."""

import json
import logging
import signal
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficientllm import accounting, architecture, data, sharding
from efficientllm import model as models
from efficientllm.infer import measure, prompts
from efficientllm.infer.engine import Engine, check_prompts
from efficientllm.metrics import energy, memory, paper, provenance, record
from efficientllm.metrics.reading import Reading, missing
from efficientllm.metrics.sampler import Sampler
from efficientllm.metrics.tensorboard import SummaryWriter
from efficientllm.quant import tree as quant
from efficientllm.registry import build, register
from efficientllm.train import evaluate, setup, step
from efficientllm.train.progress import close_log, open_log
from efficientllm.workdir import config_hash, flatten, plain, write_atomically

log = logging.getLogger("efficientllm")
FAILED = 3


@register("task", "infer")
def infer(config, workdir):
    """Generates for `config.infer.prompts`, measures, scores -> exit status. Raises UserError."""
    open_log(workdir.path / "log.txt")
    try:
        return Inference(config, workdir).run()
    finally:
        close_log()


class Inference:
    """One run from start to row, on one process."""

    def __init__(self, config, workdir):
        self.config, self.workdir, self.started = config, workdir, time.time()
        self.writer = None

    def run(self):
        """Returns the exit status."""
        self._prepare()
        self.workdir.claim(self.config)
        self.reader = energy.open_reader(jax.local_devices(), meter=self.config.metrics.meter)
        self.idle = energy.idle_power(self.reader)
        try:
            with jax.set_mesh(self.mesh), Sampler(jax.local_devices(), self.reader, 0.1) as self.sampler:
                return self._serve()
        except KeyboardInterrupt:
            log.info("SIGINT: what was generated is in samples/")
            return 128 + signal.SIGINT
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            log.error(f"out of device memory: {str(error).splitlines()[0]}")
            record.write_record(self._record("oom"), self.workdir.path / "record.json")
            return FAILED

    def _prepare(self):
        config, ours = self.config, self.config.infer
        source = setup.open_pretrained(config.model.pretrained)
        described = setup.described(config.model, source)
        architecture.check(described)
        self.tokenizer = setup.tokenizer_of(config, source)
        self.lm = architecture.from_config(described, self.tokenizer.vocab_size)
        self.sampler_spec = build("sampler", ours.sampler, where="config.infer.sampler")
        quant.form_of(config.quant)
        self.texts = prompts.read(ours.prompts)
        self.prompts = prompts.encode(self.texts, self.tokenizer, ours.chat)
        check_prompts(self.prompts)
        prompts.check_lengths(self.prompts, ours.max_new_tokens, source.max_positions if source else None)
        self.mesh = sharding.make_mesh("data=1", jax.devices()[:1])  # one device serves
        self.source = source

    def _load(self):
        """The parameters, and the compressed ones; bytes of both."""
        boxed = models.abstract_params(self.lm)
        if self.source is None:
            params = jax.jit(lambda: nn.unbox(step.init_params(self.lm, self.config.seed, 8)))()
        else:
            params = self.source.load(nn.unbox(boxed), lm=self.lm)
        self.original_bytes = _bytes(params)
        log.info(f"{self.config.name}: {self.original_bytes / 1e6:,.0f} MB as float32")
        return boxed, params

    def _serve(self):
        boxed, params = self._load()
        baseline = self._quality(params)
        self.params = quant.quantize(params, self.config.quant)
        self.bytes = _bytes(self.params)
        del params
        same = self.config.quant == "float32"
        self.quality = baseline if same else self._quality(self.params)
        self.baseline = baseline
        length = max(max(map(len, self.prompts)), self.config.infer.prompt_length) + self.config.infer.max_new_tokens
        engine = Engine(self.lm, self.params, self.sampler_spec, self.tokenizer.eos_id, length)
        self._generate(engine)
        ours = self.config.infer
        self.measured = measure.measure(
            engine,
            self.lm.vocab_size,
            ours.batch_size,
            ours.prompt_length,
            ours.max_new_tokens,
            ours.repeats,
            self.reader,
            self.sampler,
        )
        self.boxed = boxed
        found = self._record("ok")
        record.write_record(found, self.workdir.path / "record.json")
        with_charts = {f"row/{key}": value for group in ("paper", "quality") for key, value in found[group].items()}
        writer = SummaryWriter(self.workdir.path)
        writer.hparams(flatten(plain(self.config)), with_charts)
        writer.close()
        log.info(f"\n{record.format_table(found)}\n\nrow: {self.workdir.shown / 'record.json'}")
        log.info(f"compare runs: tensorboard --logdir={self.workdir.siblings}")
        return 0

    def _quality(self, params):
        """Held-out loss, perplexity and bits per byte."""
        train = self.config.train
        rows = (self.config.data, self.tokenizer, train.batch_size, train.length)
        batches = data.eval_batches(*rows, limit=self.config.eval.batches or None)
        whole = jax.jit(lambda p, batch, token_bytes: step.eval_step(self.lm, p, batch, token_bytes))
        return evaluate.evaluate(whole, params, batches, setup.bytes_of(self.tokenizer, self.lm), self.mesh)

    def _generate(self, engine):
        """Prints what the first prompt is given as it comes, and writes all answers."""
        ours, shown = self.config.infer, ""
        folder = self.workdir.path / "samples"
        folder.mkdir(exist_ok=True)
        answers = [[] for _ in self.prompts]
        try:
            for answers in engine.generate(self.prompts, ours.max_new_tokens, self.config.seed, 16, self._stops):
                text = self.tokenizer.decode(answers[0])
                print(text[len(shown) :], end="", flush=True)
                shown = text
        finally:
            print()
            texts = [self._cut(self.tokenizer.decode(ids)) for ids in answers]
            lines = [json.dumps({"prompt": a, "answer": b}) for a, b in zip(self.texts, texts, strict=True)]
            write_atomically(folder / "generated.jsonl", "\n".join(lines) + "\n")

    def _stops(self, ids):
        return any(text in self.tokenizer.decode(ids) for text in self.config.infer.stop)

    def _cut(self, text):
        return text[: min((text.find(stop) for stop in self.config.infer.stop if stop in text), default=len(text))]

    def _record(self, outcome):
        study, physical, quality = self._readings() if outcome == "ok" else (None, None, None)
        return record.build_record(
            outcome=outcome,
            name=self.config.name,
            task="infer",
            config=plain(self.config),
            provenance=provenance.provenance(
                reader=self.reader,
                started=self.started,
                ended=time.time(),
                config_hash=config_hash(self.config),
                seed=self.config.seed,
                mesh=self.mesh,
                kernels={},
            ),
            paper_readings=study,
            physical=physical,
            quality=quality,
        )

    def _readings(self):
        found, ours = self.measured, self.config.infer
        params = accounting.parameters(self.lm, self.boxed)
        generated = found.rows * found.new_tokens * len(found.decode_s)
        seconds = sum(found.requests_s)
        work = paper.Work("infer", tuple(found.requests_s), seconds, params["active"], generated=generated)
        compression = paper.Compression(
            self.original_bytes,
            self.bytes,
            1 / self.baseline["bits_per_byte"],
            1 / self.quality["bits_per_byte"],
            "bytes per held-out bit",
        )
        window = energy.combine([found.prefill_energy, found.decode_energy])
        study = paper.paper_metrics(work, found.averages, window, compression)
        decode = statistics.median(found.decode_s)
        tpot = [seconds / found.new_tokens for seconds in found.decode_s]
        tails = found.steps_s.statistics()
        of = f"{len(found.prefill_s)} batches of {found.rows} x {ours.prompt_length} tokens"
        state = accounting.state_bytes(self.lm, ours.prompt_length + ours.max_new_tokens)
        physical = {
            "ttft_s": Reading(statistics.median(found.prefill_s), "s", f"median of {of}: prefill and the first logits"),
            "tpot_s": Reading(statistics.median(tpot), "s", f"median of {of}: {found.new_tokens} tokens in one call"),
            **{f"tpot_{key}_s": tails[key] for key in ("p50", "p90", "p95", "p99")},
            "prefill_tokens_per_s": Reading(
                found.rows * ours.prompt_length / statistics.median(found.prefill_s), "1/s", f"median of {of}"
            ),
            "tokens_per_s": Reading(found.rows * found.new_tokens / decode, "1/s", "decoded, without prefill"),
            "requests_per_s": Reading(found.rows * len(found.decode_s) / seconds, "1/s", of),
            "params_total": Reading(params["total"], "1", "parameter tree"),
            "params_active": Reading(params["active"], "1", "parameter tree"),
            "params_trainable": missing("1", "nothing learns"),
            "resident_weight_bytes": Reading(self.bytes, "bytes", "arrays of the parameter tree"),
            "kv_bytes_per_token": Reading(
                state / (ours.prompt_length + ours.max_new_tokens), "bytes", "closed formula, whole context"
            ),
            "peak_memory_bytes": memory.peak_bytes(jax.local_devices(), 0),
            **paper.energy_metrics(found.decode_energy, found.rows * found.new_tokens * len(found.decode_s), self.idle),
        }
        units = {"eval_loss": "nat", "perplexity": "1", "bits_per_byte": "bit"}
        quality = {key: Reading(value, units[key], "held-out text") for key, value in self.quality.items()}
        return study, physical, quality


def _bytes(params):
    """Bytes of the arrays; jnp.int4 would count half a byte an element, and no form of ours holds it."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params))
