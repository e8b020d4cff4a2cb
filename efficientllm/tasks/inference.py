"""The infer task: answers requests of text or pictures, measures how, scores quality, writes a row."""

import contextlib
import functools
import logging
import math
import signal
import typing

import jax

from efficientllm.cost import device_peaks
from efficientllm.evaluation import held_out, lm_eval_tasks
from efficientllm.infer import row
from efficientllm.infer import setup as infer_setup
from efficientllm.infer.measurement_windows import Windows
from efficientllm.infer.serving import OutOfMemory
from efficientllm.metrics import memory
from efficientllm.metrics.energy import reader
from efficientllm.metrics.sampler import Sampler
from efficientllm.plan import memory_check
from efficientllm.record.row import format_table
from efficientllm.record.workdir import Workdir
from efficientllm.registry import parse_spec, register
from efficientllm.runtime import kernel_choice, malloc, stopping
from efficientllm.runtime.log import Countdown
from efficientllm.tasks import failures, samples
from efficientllm.tasks.base import FAILED, Run
from efficientllm.typing import Config
from efficientllm.weights import activation_dtype, resident_bytes

log = logging.getLogger("efficientllm")


@register("task", "infer")
class Inference(Run):
    """Completion of prompts or sampling of pictures, with speed and quality, on devices of one process."""

    def __init__(self, config: Config, workdir: Workdir) -> None:
        super().__init__(config, workdir)
        self.kernels: dict[str, list[str]] = {}
        self.measured: typing.Any = None  # what `serving.measure` returned
        self.samples = workdir.path / "samples"
        self.judged_facts = None  # of the pictures that were judged

    def run(self) -> int:
        """Serves and measures -> exit status."""
        # Checked before a checkpoint is opened, which can take a minute, where it is known that tasks of text fit it.
        of_text = parse_spec(self.config.objective)[0] == "next_token"
        if of_text:
            lm_eval_tasks.check(self.config.quality)
        self.serving = infer_setup.prepare(self.config)
        if not of_text:
            lm_eval_tasks.check(self.config.quality)
        samples.check_judged(self.config, self.serving.objective)
        memory_check.check_serving(self.serving)
        if self.config.infer.baseline.endswith(".json"):
            row.check_baseline(self.config, self._facts("ok"))
        self.workdir.claim(self.config)
        self.reader = reader.open_reader(self.serving.devices, meter=self.config.metrics.meter)
        self.idle = reader.idle_power(self.reader)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(_sigterm_as_keyboard_interrupt())
                stack.enter_context(jax.set_mesh(self.serving.mesh))
                interval_s = self.config.metrics.interval_s
                self.averages = stack.enter_context(Sampler(self.serving.devices, self.reader, interval_s))
                return self._serve()
        except KeyboardInterrupt as stop:
            name = stop.args[0] if stop.args else "SIGINT"
            log.info(f"\n{name}: what was generated is in {self.workdir.shown / 'samples'}")
            return 128 + (signal.SIGTERM if stop.args else signal.SIGINT)
        except OutOfMemory as error:
            return self._fail("oom", str(error))
        except jax.errors.JaxRuntimeError as error:
            if not (message := failures.out_of_memory(error)):
                raise
            return self._fail("oom", message)

    def _serve(self):
        stopping.raise_if_stopped()
        serving, infer_config = self.serving, self.config.infer
        device_count = len(serving.devices)
        log.info(
            f"{self.config.name}: {self.config.model.pretrained or f'random weights of size {self.config.model.size}'} "
            f"as {self.config.quant} on {device_count} x {serving.devices[0].device_kind}"
        )
        # The result is cached on the host; measured here so that it never runs between steps.
        device_peaks.measure_gemm_peak(activation_dtype(serving.lm.precision).name)
        device_peaks.measure_copy_bandwidth()
        serving.prepare_requests()
        self.params = serving.load(self.config.quant, infer_config.rules)
        malloc.trim()  # return memory freed by quantization
        self._log_weights(self.config.quant, self.params)
        engine = serving.engine(self.params)
        with kernel_choice.recording_kernels() as used:
            serving.generate(engine, self.samples, Windows(self.reader, self.averages))
            self.measured = serving.measure(engine, self.reader, self.averages)
        self.kernels = {operation: sorted(kinds) for operation, kinds in used.items()}
        # Read before the baseline's weights are loaded.
        self.peak = memory.peak_bytes(serving.devices, serving.rss_before)
        self.idle = self.idle.compared(reader.idle_power(self.reader))
        self.quality = self._score(self.params)
        return self._finish()

    def _log_weights(self, spec, params):
        """Logs the bytes of the weights and their conversions."""
        history = self.serving.history(spec)
        message = f"weights of {resident_bytes(params) / 1e6:,.1f} MB as {spec}" + (f", {history}" if history else "")
        advice = "; config.quant='stored' keeps the file's" if history.startswith("rounded twice") else ""
        log.info(f"{self.config.name}: {message}{advice}")

    def _score(self, params):
        """Evaluates the held-out losses of the objective; none without data."""
        serving, objective = self.serving, self.serving.objective
        if serving.dataset is None:
            return {}
        score = jax.jit(functools.partial(objective.held_out_sums, serving.lm))
        table = objective.held_out_table(serving.lm, serving.dataset)
        on_batch = Countdown(objective.evaluated_on, len(serving.held_out)).add
        shardings = objective.batch_shardings(serving.lm, serving.mesh)
        scores = held_out.evaluate(objective, score, params, serving.held_out, table, shardings, on_batch)
        log.info(held_out.line(scores))
        return scores

    def _tasks(self):
        """Readings of lm-eval's tasks, and of `config.quality.results`, a file of earlier ones."""
        serving, quality_config = self.serving, self.config.quality
        readings = lm_eval_tasks.readings_of_file(quality_config.results) if quality_config.results else {}
        if quality_config.tasks:
            from efficientllm.evaluation import lm_eval_model, lm_eval_vision  # lm-eval is an extra

            max_length = serving.max_positions or lm_eval_tasks.POSITIONS
            arguments = serving.lm, self.params, serving.tokenizer, max_length, quality_config.batch_size
            if serving.processor is None:
                model = lm_eval_model.Harness(*arguments, self.config.seed)
            else:
                model = lm_eval_vision.VisionHarness(serving.processor, *arguments, self.config.seed)
            file = self.workdir.path / "results.json"
            readings |= lm_eval_tasks.score(model, quality_config, self.config.infer.chat, self.config.seed, file)
        return readings

    def _judge_pictures(self):
        """Readings of `config.quality.fd` pictures; describes those that were drawn. Nothing for text."""
        if self.serving.objective.reads != "images":
            return {}
        painter = samples.painter_of_serving(self.serving, self.params)
        if self.serving.drawn is not None:
            with failures.optional("what was drawn is not described", self.notes):
                samples.describe_grid(painter, self.serving.drawn, self.samples)
        readings, self.judged_facts = samples.judge_pictures(painter, self.config.quality.fd)
        return readings

    def _compression(self):
        """The inputs of MCR, or None; the baseline is loaded last, after the measured weights are freed."""
        name, objective = self.config.infer.baseline, self.serving.objective
        if objective.judged_by not in self.quality:  # no held-out token decodes to text
            return None
        compressed = row.ScoredForm(self.config.quant, resident_bytes(self.params), self.quality[objective.judged_by])
        if name.endswith(".json"):
            return row.compression(objective, row.baseline_of(name, objective), compressed)
        if name == "" or (name == self.config.quant and not self.config.infer.rules):
            return row.compression(objective, compressed, compressed) if name else None
        self.params = None
        params = self.serving.load(name)
        log.info(f"baseline {name}: weights of {resident_bytes(params) / 1e6:,.1f} MB")
        history = self.serving.history(name)
        baseline = f"{name} ({history})" if history else name
        scored = row.ScoredForm(baseline, resident_bytes(params), self._score(params)[objective.judged_by])
        return row.compression(objective, scored, compressed)

    def _finish(self):
        """Writes the row; quality tasks or a baseline that fail are left out -> exit status."""
        serving, quality, compression = self.serving, self.serving.quality(self.quality), None
        outcome = "ok" if math.isfinite(self.quality.get("eval_loss", 0)) else "nan"
        physical = serving.physical(self.params, self.measured, self.idle)
        physical["peak_memory_bytes"] = self.peak
        history = serving.history(self.config.quant)
        for key in ("resident_weight_bytes", "predicted_memory_bytes"):
            physical[key] = row.noted(physical[key], history)
        quality = {key: row.noted(reading, history) for key, reading in quality.items()}
        if outcome == "ok":
            with failures.optional("no quality tasks", self.notes):
                quality |= self._tasks()
            quality |= self._judge_pictures()
            with failures.optional("no compression rate", self.notes):
                compression = self._compression()
        record = self._write_row(outcome, serving.study(self.measured, compression), physical, quality)
        if outcome == "nan":
            log.error(f"held-out loss {self.quality['eval_loss']}: not a number, of {self.config.quant} weights")
            return FAILED
        log.info(f"\n{format_table(record)}\n")
        with failures.optional("TensorBoard has no table of the row"):
            self.open_charts()
            self.add_to_table(record)
            serving.chart(self.writer, self.samples)
            physical = {f"_row_physical/{key}": value for key, value in record["physical"].items() if value is not None}
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
        """Provenance that only inference has."""
        facts = self.serving.facts()
        if outcome == "ok":
            facts["data"] = self.serving.describe_data()
        if self.judged_facts:
            facts["samples"] = self.judged_facts
        if not self.config.model.pretrained:
            facts["weights"] = f"random, of size {self.config.model.size}: quality means nothing"
        return facts

    def _fail(self, outcome, message):
        log.error(message)
        self._write_row(outcome)
        return FAILED


@contextlib.contextmanager
def _sigterm_as_keyboard_interrupt():
    """Context in which SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def stop(signum, frame):
        raise KeyboardInterrupt("SIGTERM")

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # signals can be handled in the main thread alone
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
