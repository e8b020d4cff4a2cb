"""The pretrain and tune tasks: from a config to a trained model, its charts, checkpoints and row."""

import logging
import math
from concurrent import futures

import jax

from efficientllm.evaluation import held_out
from efficientllm.metrics import memory, timer
from efficientllm.metrics.energy import reader
from efficientllm.metrics.reading import Reading
from efficientllm.metrics.sampler import Sampler
from efficientllm.plan import memory_check
from efficientllm.record.row import format_table
from efficientllm.record.workdir import Workdir
from efficientllm.registry import register
from efficientllm.registry.plugins import one_line_with_location
from efficientllm.runtime import distributed, stopping
from efficientllm.tasks import exports, extra_evaluation, failures, profile_table, samples
from efficientllm.tasks.base import FAILED, Run
from efficientllm.train import fingerprints, loop, row, tensorboard_scalars
from efficientllm.train import setup as train_setup
from efficientllm.train.checkpoint import DISK, CheckpointError, Checkpoints
from efficientllm.train.measure import Measurement
from efficientllm.train.profiler import Profiler
from efficientllm.train.programs import PROGRAM
from efficientllm.train.progress import Progress
from efficientllm.train.run_summary import headline
from efficientllm.typing import Config, Record

log = logging.getLogger("efficientllm")


@register("task", "pretrain")
@register("task", "tune")
class Training(Run):
    """Training to `config.train.steps`, resumed from a checkpoint in the workdir.

    Tuning is training that starts from `config.model.pretrained`; its row counts samples where pre-training's counts
    tokens.
    """

    def __init__(self, config: Config, workdir: Workdir) -> None:
        super().__init__(config, workdir)
        self.loss, self.evaluation, self.first_step = None, None, 0
        self.judged: dict[str, Reading] = {}
        self.judged_facts: Record | None = None
        self.profile: Record = {}
        self.checkpoints: Checkpoints | None = None
        self.sampler: Sampler | None = None
        self.counts_flops = True

    def run(self) -> int:
        """Trains -> exit status."""
        distributed.call_in_all(self._prepare)
        self.reader = reader.open_reader(jax.local_devices(), meter=self.config.metrics.meter)
        self.idle = reader.idle_power(self.reader)
        self.checkpoints = Checkpoints(self.workdir.checkpoints, self.config.checkpoint.keep)
        self.sampler = Sampler(jax.local_devices(), self.reader, self.config.metrics.interval_s).start()
        # A run of a few steps measures half of them, and reports that their times had not settled.
        warm_up_steps = max(1, min(timer.CAP, self.config.train.steps // 2))
        self.measurement = Measurement(self.reader, self.sampler, warm_up=warm_up_steps)
        try:
            with jax.set_mesh(self.setup.mesh):
                return self._train_or_stop()
        except loop.Diverged as error:
            self._distrust(error.state_step)
            return self._fail("nan", f"{error}: not a number; {self._last_good()}")
        except jax.errors.JaxRuntimeError as error:
            if message := failures.out_of_memory(error):
                return self._fail("oom", message)
            if jax.process_count() == 1:
                raise
            first = str(error).splitlines()[0]
            message = f"a step failed, as it does where another process has died: {first}; {self._last_good()}"
            return self._fail("crash", message, distributed.LOST)
        except (CheckpointError, OSError) as error:  # a full disk stops checkpoints, charts or the row
            if isinstance(error, OSError) and error.errno not in DISK:
                raise
            lost = jax.process_count() > 1 and isinstance(error.__cause__, jax.errors.JaxRuntimeError)
            return self._fail("crash", f"{error}; {self._last_good()}", distributed.LOST if lost else FAILED)

    def _train_or_stop(self):
        try:
            return self._train()
        except loop.Interrupted as stop:
            self.checkpoints.wait()
            log.info(f"{stop}: saved in {self.workdir.shown}; the same command resumes")
            return 128 + stop.signum

    def _prepare(self):
        self.setup = train_setup.prepare(self.config, log)
        samples.check(self.setup)
        memory_check.check_shapes(self.setup)
        if self.is_main:
            self.workdir.claim(self.config)

    def _train(self):
        stopping.raise_if_stopped()
        with futures.ThreadPoolExecutor(1) as background:
            self.compiled, compiled_eval = train_setup.compile_steps(self.setup, background)
            distributed.call_in_all(lambda: memory_check.check_compiled(self.setup))
            self.held_out_table = train_setup.held_out_table(self.setup)
            state = self._restore_or_create()
            self.compiled_eval = compiled_eval.result()
        if self.is_main:
            self.setup.dataset.keep(self.workdir.path)
            self.open_charts(self.first_step + 1)
        log.info(headline(self.setup))
        self.progress = Progress(self.config.train.steps, unit=self.setup.objective.counted)
        stopping.raise_if_stopped()
        hooks = loop.Hooks(self._log, self._evaluate, self._save, self.checkpoints.saving)
        state = loop.train(
            self.config,
            state,
            self.compiled,
            self.setup.batches,
            self.setup.batch_shardings,
            self.measurement,
            self.progress,
            hooks,
            Profiler.of(self.config.profile.steps, self.first_step, self.workdir.path if self.is_main else None),
        )
        self.checkpoints.wait()
        if self.evaluation is None:  # resumed after its last step
            self._evaluate(self.config.train.steps, state)
        self._finish(state)
        return 0

    def _restore_or_create(self):
        """The newest checkpoint's state, or a new one. Checkpoints hold no frozen parameters; they are recreated."""
        setup, shaped = self.setup, self.setup.shaped
        now = self.checkpoints.facts = fingerprints.of(setup)
        restored = self.checkpoints.restore_newest(shaped.replace(frozen=None))
        if restored is None:
            return train_setup.create_state(setup)
        state, data_state = restored
        before = self.checkpoints.restored_facts
        fingerprints.check(before, now, self.config)
        setup.batches.set_state(data_state)
        self.first_step = int(state.step)
        self.checkpoints.facts = fingerprints.joined(before, now, self.first_step, self.config)
        log.info(f"resuming from step {self.first_step}")
        if message := fingerprints.line(self.checkpoints.facts["schedules"]):
            log.warning(message)
        frozen = train_setup.create_state(setup).frozen if jax.tree.leaves(shaped.frozen) else shaped.frozen
        return state.replace(frozen=frozen)

    def _log(self, at, metrics, seconds):
        self.loss = float(metrics["loss"])
        log.info(self.progress.line(at, self.loss))
        if self.writer:
            scalars = tensorboard_scalars.scalars(metrics, self.setup.lm.stacks.layer_numbers)
            scalars |= {"tokens_per_s": float(metrics["tokens"]) / seconds, **self.sampler.latest()}
            if self.setup.objective.counted != "tokens":
                scalars[f"{self.setup.objective.counted}_per_s"] = float(metrics["samples"]) / seconds
            scalars |= self._utilisation(seconds, metrics.get(PROGRAM, 0))
            self.writer.scalars(at, scalars)

    def _utilisation(self, seconds, program):
        """MFU for the charts; empty, after one warning, where a technique's FLOPs cannot be counted."""
        if not self.counts_flops:
            return {}
        try:
            return row.utilisation(self.setup, seconds, program)
        except Exception as error:
            self.counts_flops = False
            failures.warn("no FLOPs are counted", error)
            return {}

    def _evaluate(self, at, state):
        setup = self.setup
        batches, shardings = setup.eval_batches, setup.batch_shardings
        self.evaluation = held_out.evaluate(
            setup.objective, self.compiled_eval, state.eval_params, batches, self.held_out_table, shardings
        )
        log.info(held_out.line(self.evaluation))
        if self.writer:
            self.writer.scalars(at, self.evaluation)
        loss = self.evaluation["eval_loss"]
        if not math.isfinite(loss):
            raise loop.Diverged(at, loss, "held-out loss", state_step=at)
        return loss

    def _save(self, at, state, loss):
        self.checkpoints.save(at, state.replace(frozen=None), self.setup.batches.get_state(), loss)

    def _finish(self, state):
        """Writes the row, then the exports, which may fail without losing it."""
        self.idle = row.all_idle(self.idle.compared(reader.idle_power(self.reader)))
        costs = self._readings(row.all_energy(self.measurement))  # before pictures are drawn, which takes memory
        with failures.optional("the trace of the profiled steps has no table"):
            if self.is_main:
                self.profile = profile_table.summarize(self.setup, self.measurement, self.workdir.path)
        self.judged = extra_evaluation.readings(self.setup, self.compiled_eval, state, self.held_out_table)
        painter = samples.painter_of_training(self.setup, state.eval_params)
        if painter:
            self.judged, self.judged_facts = samples.judge_pictures(painter, self.config.quality.fd)
        record = self._write_row("ok", costs)
        if self.is_main:
            log.info(f"\n{format_table(record)}")
        with failures.optional("no adapter was written"):
            exports.write_adapter(self.setup, self.workdir, state)
        with failures.optional("no sample was drawn"):
            if painter:
                folders = self.workdir.path / "samples", self.workdir.shown / "samples"
                samples.write_grid(painter, self.config.sample.images, *folders, self.writer, self.config.train.steps)
            elif text := samples.complete_text(self.setup, state.eval_params):
                log.info(f"\nsample: {text!r}\n")
        with failures.optional("no sample of the base model was drawn"):
            if painter and self.setup.source is not None:
                samples.write_base_grid(self.setup, painter, self.workdir.path, self.workdir.shown, self.writer)
        with failures.optional("TensorBoard has no table of the row"):
            if self.writer:
                self.add_to_table(record)
        with failures.optional("checkpoints stay as they are"):
            exports.keep_checkpoints(self.checkpoints, self.config.checkpoint.keep)
        if self.is_main:
            if note := memory.disagreement(record["physical"]):
                log.warning(note)
            self.log_locations()

    def _write_row(self, outcome, costs, message=None):
        paper, physical = costs
        if (stored := self.checkpoints.newest_bytes()) is not None:
            physical["checkpoint_bytes"] = Reading(
                stored, "bytes", "files of the newest checkpoint: trainable parameters, moments"
            )
        record = self.build_row(
            outcome,
            reader=self.reader,
            mesh=self.setup.mesh,
            kernels=self.setup.kernels,
            facts=self._facts(),
            error=message,
            paper_readings=paper,
            physical=physical,
            quality=row.quality(self.setup.objective, self.evaluation, self.loss) | self.judged,
            warm_up=row.warm_up(self.measurement),
            conditions=row.conditions_of(self.measurement, everywhere=outcome == "ok"),
        )
        return self.write_row(record | self.profile)

    def _readings(self, energy_window):
        """The row's `(paper, physical)`; null, with the reason, where costs cannot be computed."""
        try:
            return row.readings(self.setup, self.measurement, energy_window, self.idle)
        except Exception as error:
            failures.warn("the row has no costs", error)
            return row.unknown(f"could not be computed: {one_line_with_location(error)}")

    def _facts(self):
        """Provenance that only training has."""
        return {
            "resumed_from_step": self.first_step,
            "sampler_cost_fraction": self.sampler.cost_fraction,
            "data": self.setup.data,
            "fingerprints": self.checkpoints.facts.get("fingerprints"),
            "schedules": self.checkpoints.facts.get("schedules"),
            **({"samples": self.judged_facts} if self.judged_facts else {}),
            **self.setup.objective_facts,
        }

    def _fail(self, outcome, message, status=FAILED):
        self.measurement.abandon()
        log.error(message)
        try:  # other processes may not have failed: do not wait for their energy readings
            self._write_row(outcome, self._readings(reader.unavailable_window(f"the run ended as {outcome}")), message)
        except OSError as error:
            log.error(f"no row could be written: {error}")
        if outcome == "nan":  # all processes see the same loss
            return FAILED
        super().close()
        return distributed.exit_process(status)

    def _last_good(self):
        step_saved = self.checkpoints.latest_step()
        return (
            "no good checkpoint was saved" if step_saved is None else f"the last good checkpoint is step {step_saved}"
        )

    def _distrust(self, step):
        """Renames the checkpoint whose loss is not finite, so that no run resumes from it."""
        with failures.optional("no checkpoint was set aside"):
            self.checkpoints.wait()
            self.checkpoints.distrust(step)

    def close(self) -> None:
        """Stops threads and closes files."""
        if self.sampler:
            self.sampler.stop()
        super().close()
        if self.checkpoints:
            self.checkpoints.close()
