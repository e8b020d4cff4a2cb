"""Pre-training and tuning: from a config to a trained model, its charts, its checkpoints and its row."""

import contextlib
import logging
import time

import jax

from efficientllm import distributed
from efficientllm.adapters import folder as adapter_folder
from efficientllm.errors import UserError
from efficientllm.infer.generate import generate
from efficientllm.metrics import energy, memory, provenance, record, timer
from efficientllm.metrics.reading import Reading
from efficientllm.metrics.sampler import Sampler
from efficientllm.metrics.tensorboard import SummaryWriter
from efficientllm.registry import register
from efficientllm.train import charts, evaluate, loop, row, setup
from efficientllm.train.checkpoint import CheckpointError, Checkpoints
from efficientllm.train.measure import Measurement
from efficientllm.train.progress import Progress, close_log, open_log
from efficientllm.workdir import config_hash, flatten, plain

log = logging.getLogger("efficientllm")
FAILED = 3


@register("task", "pretrain")
@register("task", "tune")
def train(config, workdir):
    """Trains to `config.train.steps`, resuming what the workdir holds -> exit status. Raises UserError.

    Tuning is training that starts from `config.model.pretrained`; its row counts samples where pre-training's counts
    tokens.
    """
    run = Training(config, workdir)
    try:
        return run.run()
    finally:
        run.close()


class Training:
    """One run from start to row. Only the main process writes logs, charts, samples and the row."""

    def __init__(self, config, workdir):
        self.config, self.workdir, self.started = config, workdir, time.time()
        self.main = distributed.is_main()
        open_log(workdir.path / "log.txt" if self.main else None)
        self.loss, self.evaluation, self.first_step = None, None, 0
        self.checkpoints = self.writer = self.sampler = None

    def run(self):
        """Returns the exit status."""
        distributed.together(self._prepare)
        self.reader = energy.open_reader(jax.local_devices(), meter=self.config.metrics.meter)
        self.idle = energy.idle_power(self.reader)
        self.checkpoints = Checkpoints(self.workdir.checkpoints, self.config.checkpoint.keep)
        self.sampler = Sampler(jax.local_devices(), self.reader, self.config.metrics.interval_s).start()
        # A run of a few steps measures half of them, and says that they had not settled, rather than none.
        aside = max(1, min(timer.CAP, self.config.train.steps // 2))
        self.measurement = Measurement(self.reader, self.sampler, warm_up=aside)
        try:
            with jax.set_mesh(self.setup.mesh):
                return self._train()
        except loop.Interrupted as stop:
            self.checkpoints.wait()
            log.info(f"{stop}: saved in {self.workdir.shown}; the same command resumes")
            return 128 + stop.signum
        except loop.Diverged as error:
            return self._fail("nan", f"{error}: not a number; {self._last_good()}")
        except jax.errors.JaxRuntimeError as error:
            first = str(error).splitlines()[0]
            if "RESOURCE_EXHAUSTED" in str(error):
                return self._fail("oom", f"out of device memory: {first}")
            if jax.process_count() == 1:
                raise
            message = f"a step failed, as it does where another process has died: {first}; {self._last_good()}"
            return self._fail("crash", message, distributed.LOST)
        except (CheckpointError, OSError) as error:  # a full disk stops checkpoints, charts or the row
            lost = jax.process_count() > 1 and isinstance(error.__cause__, jax.errors.JaxRuntimeError)
            return self._fail("crash", f"{error}; {self._last_good()}", distributed.LOST if lost else FAILED)

    def _prepare(self):
        self.setup = setup.prepare(self.config, log)
        if self.main:
            self.workdir.claim(self.config)

    def _train(self):
        self.compiled, self.compiled_eval = setup.compile_steps(self.setup)
        self.token_bytes = setup.token_bytes(self.setup)
        state = self._restore_or_create()
        if self.main:
            self.writer = SummaryWriter(self.workdir.path, first_step=self.first_step + 1)
            self.writer.text("config", _markdown(self.config))
        log.info(self._headline())
        self.progress = Progress(self.config.train.steps)
        hooks = loop.Hooks(self._log, self._evaluate, self._save, self.checkpoints.saving)
        batches = self.setup.batches
        state = loop.train(
            self.config, state, self.compiled, batches, self.setup.mesh, self.measurement, self.progress, hooks
        )
        self.checkpoints.wait()
        if self.evaluation is None:  # resumed from its very last step
            self._evaluate(self.config.train.steps, state)
        self._finish(state)
        return 0

    def _restore_or_create(self):
        """The newest checkpoint's state, or a new one. What is frozen is in no checkpoint: it is made as it was."""
        run, shaped = self.setup, self.setup.shaped
        restored = self.checkpoints.restore_newest(shaped.replace(frozen=None))
        if restored is None:
            return setup.create_state(run)
        state, data_state = restored
        run.batches.set_state(data_state)
        self.first_step = int(state.step)
        log.info(f"resuming from step {self.first_step}")
        frozen = setup.create_state(run).frozen if jax.tree.leaves(shaped.frozen) else shaped.frozen
        return state.replace(frozen=frozen)

    def _log(self, at, metrics, seconds):
        self.loss = float(metrics["loss"])
        log.info(self.progress.line(at, self.loss))
        if self.writer:
            shown = charts.scalars(metrics, len(self.setup.lm.blocks))
            shown |= {"tokens_per_s": float(metrics["tokens"]) / seconds, **self.sampler.latest()}
            shown |= row.utilisation(self.setup, seconds)
            self.writer.scalars(at, shown)

    def _evaluate(self, at, state):
        self.evaluation = evaluate.evaluate(
            self.compiled_eval, state.all_params, self.setup.eval_batches, self.token_bytes, self.setup.mesh
        )
        log.info("held out  " + "  ".join(f"{key} {value:.4f}" for key, value in self.evaluation.items()))
        if self.writer:
            self.writer.scalars(at, self.evaluation)
        return self.evaluation["eval_loss"]

    def _save(self, at, state, loss):
        self.checkpoints.save(at, state.replace(frozen=None), self.setup.batches.get_state(), loss)

    def _finish(self, state):
        self._write_adapter(state)
        sample = self._sample(state.all_params) if self.config.sample.tokens else None
        self.idle = row.all_idle(self.idle.compared(energy.idle_power(self.reader)))
        found = self._write_row("ok", row.all_energy(self.measurement))
        if self.main:
            log.info(f"\n{record.format_table(found)}\n" + (f"\nsample: {sample!r}\n" if sample else ""))
            if note := memory.disagreement(found["physical"]):
                log.warning(note)
            log.info(f"row: {self.workdir.shown / 'record.json'}")
            log.info(f"compare runs: tensorboard --logdir={self.workdir.siblings}")

    def _write_adapter(self, state):
        """The adapter in peft's format, where peft has one and there is a checkpoint to put it around."""
        run = self.setup
        if run.source is None or not adapter_folder.is_writable(self.config.adapter):
            return
        folder = self.workdir.path / "adapter"
        try:
            adapter_folder.write(run.lm, self.config.adapter, state.all_params, folder, run.source)
        except UserError as error:  # what was learnt is in the checkpoint
            if self.main:
                log.warning(f"no adapter in peft's format: {error}")
            return
        if self.main:
            log.info(f"adapter: {self.workdir.shown / 'adapter'}, in peft's format")

    def _sample(self, params):
        prompt = self.setup.tokenizer.encode_prompt(self.config.sample.prompt)
        key = jax.random.key(self.config.seed)
        new = generate(
            self.setup.lm,
            params,
            [prompt],
            self.config.sample.tokens,
            self.config.sample.temperature,
            key,
            self.setup.tokenizer.end_ids,
        )
        return self.config.sample.prompt + self.setup.tokenizer.decode(jax.device_get(new)[0].tolist())

    def _write_row(self, outcome, energy_window):
        study, physical = row.readings(self.setup, self.measurement, energy_window, self.idle)
        if (stored := self.checkpoints.newest_bytes()) is not None:
            physical["checkpoint_bytes"] = Reading(
                stored, "bytes", "files of the newest checkpoint: what learns, moments"
            )
        found = record.build_record(
            outcome=outcome,
            name=self.config.name,
            task=self.config.task,
            config=plain(self.config),
            provenance=self._provenance(),
            paper_readings=study,
            physical=physical,
            quality=row.quality(self.evaluation, self.loss),
            warm_up=row.warm_up(self.measurement),
            conditions=row.conditions_of(self.measurement, everywhere=outcome == "ok"),
        )
        if self.main:
            record.write_record(found, self.workdir.path / "record.json")
            if self.writer:
                self.writer.hparams(flatten(plain(self.config)), found["paper"] | found["quality"])
        return found

    def _provenance(self):
        return provenance.provenance(
            reader=self.reader,
            started=self.started,
            ended=time.time(),
            config_hash=config_hash(self.config),
            seed=self.config.seed,
            mesh=self.setup.mesh,
            kernels=self.setup.kernels,
        ) | {
            "resumed_from_step": self.first_step,
            "sampler_cost_fraction": self.sampler.cost_fraction,
            "data": self.setup.data,
        }

    def _fail(self, outcome, message, status=FAILED):
        self.measurement.abandon()
        log.error(message)
        try:  # alone: other processes may not have failed, so their energy is not waited for
            self._write_row(outcome, energy.unavailable(f"the run ended as {outcome}"))
        except OSError as error:
            log.error(f"no row could be written: {error}")
        if outcome == "nan":  # as all processes see
            return FAILED
        self._close_writer()
        return distributed.leave(status)

    def _last_good(self):
        step_saved = self.checkpoints.latest_step()
        return "no checkpoint was saved" if step_saved is None else f"the last good checkpoint is step {step_saved}"

    def close(self):
        """Stops threads and closes files."""
        if self.sampler:
            self.sampler.stop()
        self._close_writer()
        if self.checkpoints:
            self.checkpoints.close()
        close_log()

    def _close_writer(self):
        if self.writer:
            with contextlib.suppress(OSError):  # a full disk has been said
                self.writer.close()
        self.writer = None

    def _headline(self):
        devices = jax.devices()
        return (
            f"{self.config.name}: {self.config.train.steps} steps of {self.setup.batch_size} x {self.setup.length} "
            f"tokens on {len(devices)} x {devices[0].device_kind}; compiled in {self.setup.compile_s['compile']:.1f} s"
        )


def _markdown(config):
    return "\n".join(f"    {key} = {value!r}" for key, value in flatten(plain(config)).items())
