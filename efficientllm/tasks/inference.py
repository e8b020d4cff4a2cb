"""Inference: from a checkpoint to generated text, prefill and decoding measured apart, quality, and a row."""

import contextlib
import logging
import math
import signal
import sys

import jax

from efficientllm import data
from efficientllm.cost import device_peaks
from efficientllm.evaluation import held_out, lm_eval_tasks
from efficientllm.infer import measure, row
from efficientllm.infer import setup as serving
from efficientllm.infer.engine import Engine
from efficientllm.infer.streaming import Answers
from efficientllm.metrics import memory
from efficientllm.metrics.energy import reader
from efficientllm.metrics.sampler import Sampler
from efficientllm.objectives import next_token
from efficientllm.plan import memory_check
from efficientllm.record.row import format_table
from efficientllm.registry import register
from efficientllm.runtime import kernel_choice, malloc, stopping
from efficientllm.runtime.log import Countdown
from efficientllm.tasks import failures
from efficientllm.tasks.base import FAILED, Run
from efficientllm.weights import activation_dtype, resident_bytes

log = logging.getLogger("efficientllm")


@register("task", "infer")
def infer(config, workdir):
    """Generates for `config.infer.prompts`, measures, scores -> exit status. Raises UserError."""
    return Inference.execute(config, workdir)


class Inference(Run):
    """One run on devices of one process."""

    def __init__(self, config, workdir):
        super().__init__(config, workdir)
        self.kernels, self.measured = {}, None

    def run(self):
        """Returns the exit status."""
        lm_eval_tasks.check(self.config.quality)
        self.serving = serving.prepare(self.config)
        memory_check.check_serving(self.serving)
        if self.config.infer.baseline.endswith(".json"):
            row.check_baseline(self.config, data.describe_data(self.config.data, self.serving.tokenizer))
        self.workdir.claim(self.config)
        self.reader = reader.open_reader(self.serving.devices, meter=self.config.metrics.meter)
        self.idle = reader.idle_power(self.reader)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(_terminated_as_interrupted())
                stack.enter_context(jax.set_mesh(self.serving.mesh))
                interval_s = self.config.metrics.interval_s
                self.averages = stack.enter_context(Sampler(self.serving.devices, self.reader, interval_s))
                return self._serve()
        except KeyboardInterrupt as stop:
            name = stop.args[0] if stop.args else "SIGINT"
            log.info(f"\n{name}: what was generated is in {self.workdir.shown / 'samples'}")
            return 128 + (signal.SIGTERM if stop.args else signal.SIGINT)
        except serving.OutOfMemory as error:
            return self._fail("oom", str(error))
        except jax.errors.JaxRuntimeError as error:
            if not (message := failures.out_of_memory(error)):
                raise
            return self._fail("oom", message)

    def _serve(self):
        stopping.raise_if_stopped()
        run, ours = self.serving, self.config.infer
        parts = len(run.devices)
        log.info(
            f"{self.config.name}: {self.config.model.pretrained or f'random weights of size {self.config.model.size}'} "
            f"as {self.config.quant} on {parts} x {run.devices[0].device_kind}"
        )
        device_peaks.measure_gemm_peak(
            activation_dtype(run.lm.precision).name
        )  # at most once a host, and not between steps
        device_peaks.measure_copy_bandwidth()
        self.params = run.load(self.config.quant, ours.rules)
        malloc.trim()  # what rounding, and calibrating more so, has freed is no memory of serving
        self._say_weights(self.config.quant, self.params)
        engine = Engine(run.lm, self.params, run.sampler, run.tokenizer.end_ids, run.length)
        with kernel_choice.recording_kernels() as used:
            self._generate(engine)
            self.measured = measure.measure(
                engine,
                run.held_out_ids(),
                ours.batch_size,
                ours.prompt_length,
                ours.max_new_tokens,
                ours.repeats,
                self.reader,
                self.averages,
                self.config.seed,
            )
        self.kernels = {operation: sorted(kinds) for operation, kinds in used.items()}
        self.peak = memory.peak_bytes(run.devices, run.rss_before)  # before another form of the weights is loaded
        self.idle = self.idle.compared(reader.idle_power(self.reader))
        self.quality = self._score(self.params)
        return self._finish()

    def _say_weights(self, spec, params):
        """Bytes of weights, and what they went through."""
        history = self.serving.history(spec)
        said = f"weights of {resident_bytes(params) / 1e6:,.1f} MB as {spec}" + (f", {history}" if history else "")
        twice = "; config.quant='stored' keeps the file's" if history.startswith("rounded twice") else ""
        log.info(f"{self.config.name}: {said}{twice}")

    def _generate(self, engine):
        """Shows the answers as they come, and writes as many as there are, whatever happens."""
        run, ours = self.serving, self.config.infer
        answers = Answers(run.texts, run.prompts, run.tokenizer, ours.stop)
        try:
            answers.generate(engine, ours.max_new_tokens, ours.batch_size, self.config.seed, _show)
        finally:
            answers.write(self.workdir.path / "samples" / "generated.jsonl")

    def _score(self, params):
        """Held-out loss, perplexity and bits per byte."""
        run = self.serving
        score = jax.jit(lambda params, batch, token_bytes: next_token.eval_step(run.lm, params, batch, token_bytes))
        token_bytes = next_token.token_bytes(run.tokenizer, run.lm)
        each = Countdown("held-out text", len(run.held_out)).add
        found = held_out.evaluate(score, params, run.held_out, token_bytes, run.mesh, each)
        log.info(held_out.line(found))
        return found

    def _tasks(self):
        """Readings of the harness's tasks, and of results that are joined."""
        run, ours = self.serving, self.config.quality
        found = lm_eval_tasks.readings_of_file(ours.results) if ours.results else {}
        if ours.tasks:
            from efficientllm.evaluation import lm_eval_model  # lm-eval is an extra

            most = run.max_positions or lm_eval_tasks.POSITIONS
            model = lm_eval_model.Harness(run.lm, self.params, run.tokenizer, most, ours.batch_size, self.config.seed)
            file = self.workdir.path / "results.json"
            found |= lm_eval_tasks.score(model, ours, self.config.infer.chat, self.config.seed, file)
        return found

    def _compression(self):
        """What MCR compares, or None; the baseline is scored last, in the place of what was measured."""
        name = self.config.infer.baseline
        if "bits_per_byte" not in self.quality:  # no held-out token stands for text
            return None
        ours = row.Scored(self.config.quant, resident_bytes(self.params), self.quality["bits_per_byte"])
        if name.endswith(".json"):
            return row.compression(row.baseline_of(name), ours)
        if name == "" or (name == self.config.quant and not self.config.infer.rules):
            return row.compression(ours, ours) if name else None
        self.params = None
        params = self.serving.load(name)
        log.info(f"baseline {name}: weights of {resident_bytes(params) / 1e6:,.1f} MB")
        history = self.serving.history(name)
        baseline = f"{name} ({history})" if history else name
        return row.compression(row.Scored(baseline, resident_bytes(params), self._score(params)["bits_per_byte"]), ours)

    def _finish(self):
        """Writes the row, without what failed of tasks and baseline -> exit status."""
        run, quality, compared = self.serving, held_out.readings(self.quality), None
        outcome = "ok" if math.isfinite(self.quality["eval_loss"]) else "nan"
        physical = row.physical(run.lm, run.boxed, self.params, self.measured, self.idle, run.mesh)
        physical["peak_memory_bytes"] = self.peak
        history = run.history(self.config.quant)
        for key in ("resident_weight_bytes", "predicted_memory_bytes"):
            physical[key] = row.noted(physical[key], history)
        quality = {key: row.noted(reading, history) for key, reading in quality.items()}
        if outcome == "ok":
            with failures.optional("no quality tasks", self.notes):
                quality |= self._tasks()
            with failures.optional("no compression rate", self.notes):
                compared = self._compression()
        found = self._write_row(outcome, row.study(run.lm, run.boxed, self.measured, compared), physical, quality)
        if outcome == "nan":
            log.error(f"held-out loss {self.quality['eval_loss']}: not a number, of {self.config.quant} weights")
            return FAILED
        log.info(f"\n{format_table(found)}\n")
        with failures.optional("TensorBoard has no table of the row"):
            self.open_charts()
            self.add_to_table(found)
            physical = {f"_row_physical/{key}": value for key, value in found["physical"].items() if value is not None}
            self.writer.scalars(0, physical)
        self.log_locations()
        return 0

    def _write_row(self, outcome, study=None, physical=None, quality=None):
        record = self.build_row(
            outcome,
            reader=self.reader,
            mesh=self.serving.mesh,
            kernels=self.kernels,
            facts=self._facts(outcome),
            paper_readings=study,
            physical=physical,
            quality=quality,
            **(row.warm_up_and_conditions(self.measured) if self.measured else {}),
        )
        return self.write_row(record)

    def _facts(self, outcome):
        """What the provenance of an inference adds."""
        tokenizer = self.serving.tokenizer
        facts = {"end_tokens": [tokenizer.text_of(id) for id in tokenizer.end_ids]}
        if outcome == "ok":
            facts["data"] = data.describe_data(self.config.data, tokenizer)
        if not self.config.model.pretrained:
            facts["weights"] = f"random, of size {self.config.model.size}: quality means nothing"
        return facts

    def _fail(self, outcome, message):
        log.error(message)
        self._write_row(outcome)
        return FAILED


def _show(text):
    """Writes what a model says; a terminal is not to take it for commands."""
    sys.stdout.write("".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text))
    sys.stdout.flush()


@contextlib.contextmanager
def _terminated_as_interrupted():
    """SIGTERM ends the run as Ctrl-C does."""

    def stop(signum, frame):
        raise KeyboardInterrupt("SIGTERM")

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread, which alone may listen
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
