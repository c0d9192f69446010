"""The train loop of pretraining, SFT and RL, which differ in their batch source and their loss function.

A run is identified by its directory: the same command run again continues from the newest whole checkpoint, and does
nothing if the run is finished. Checkpoints are written while training goes on, see checkpoint/saving.py.
"""

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from configs import signals
from configs.model import ModelConfig
from configs.train import Precision, TrainerConfig
from pretrain import determinism
from pretrain.checkpoint import storage
from pretrain.checkpoint.adapter_base import base_facts, keep_bases
from pretrain.checkpoint.lineage import Lineage
from pretrain.checkpoint.mirror_copies import make_up
from pretrain.checkpoint.resume import identity_of
from pretrain.checkpoint.saving import Saver
from pretrain.companion import Companion
from pretrain.data.batch_source import BatchSource, check_source
from pretrain.data.data_check import DamagedTrainingData, DataCheck
from pretrain.data.step_rows import StepRows
from pretrain.evaluation.task_scores import task_scores
from pretrain.evaluation.text_samples import text_samples
from pretrain.flops import mfu_per_rate
from pretrain.health.corruption import CorruptionCheck, SilentCorruption
from pretrain.health.not_finite import NOTHING, first_not_finite
from pretrain.health.recording import StepRecorder
from pretrain.health.rewind_history import BadStep, Rewinds
from pretrain.health.spikes import SpikeGuard
from pretrain.health.stragglers import BusyTime, Stragglers
from pretrain.heldout_loss import Evaluator
from pretrain.logs.activities import CHECKING, END, EVALUATION, PREPARATION, SAVING, TRAINING, Activities
from pretrain.logs.display import Display
from pretrain.logs.metrics import MetricsLog
from pretrain.logs.start_recorder import StartRecorder
from pretrain.model.batch import Batch
from pretrain.model.losses import LossFunction
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Mesh
from pretrain.precision import choose_dtype
from pretrain.profiling import DATA, Profiler
from pretrain.report import run_report
from pretrain.run.agreement import Agreement
from pretrain.run.rewinding import go_back
from pretrain.run.run_directory import RunDirectory
from pretrain.run.step_log import NonFiniteStep, Step, StepLog, StepTimer, peak_memory
from pretrain.run.taking_up import begin_to_write, load_weights
from pretrain.schedule import learning_rate
from pretrain.tracking.trackers import Trackers, check_installed
from pretrain.watchdog.watchdog import Watchdog

FAILED = 1


class Trainer:
    """Trains a model on the samples of `source` with `loss_fn` in the layout of `mesh`; writes to `config.run.dir`.

    `lineage` has the tokenizer, and for SFT and RL the checkpoint whose weights the run starts from. `evaluators` are
    called every `eval.every` steps and after the last. `title` is the word before the display. `resume` is the
    value of `--resume`, see checkpoint/resume.py. `companion` makes a second model that is trained on the same batches,
    such as a critic. `profiled` are the steps, counted from 1, that `--profile` names.
    """

    def __init__(
        self,
        config: TrainerConfig,
        model_config: ModelConfig,
        source: BatchSource,
        loss_fn: LossFunction,
        mesh: Mesh,
        evaluators: Sequence[Evaluator] = (),
        lineage: Lineage | None = None,
        title: str = "train",
        resume: str = "auto",
        profiled: range = range(0),
        companion: Callable[["Trainer"], Companion] | None = None,
    ):
        determinism.choose(config.train.deterministic)
        check_installed(config.tracking)
        dtype = choose_dtype(config.train.precision, mesh.device)
        precision = Precision.BF16 if dtype == torch.bfloat16 else Precision.FP32
        train = config.train.model_copy(update={"precision": precision})
        self.config = config.model_copy(update={"train": train})
        self.model_config, self.source, self.loss_fn, self.mesh = model_config, source, loss_fn, mesh
        self.lineage, self.title, self.resume = lineage or Lineage(), title, resume
        self.evaluators = [*evaluators, *task_scores(config, model_config, self.lineage)]
        self.evaluators += text_samples(config, model_config, self.lineage, lambda: self.step)
        self.profiled = profiled
        self.run = RunDirectory(self.config, model_config, source, self.lineage, mesh)
        self.step, self.samples, self.tokens = 0, 0, 0
        self.tokens_by_source = dict.fromkeys(source.sources, 0.0)  # trained on, weighted by the loss mask
        self.origin: str | None = None
        # Context length of the model, in tokens; it never shrinks, and grows with the longest text that is trained on.
        self.context = max(self.lineage.context, source.context(train.seq_length))
        self.identity = identity_of(self.config, model_config, source, self.lineage)
        if config.adapter:
            config.adapter.check_init(self.lineage.init is not None)
        self.agreement = Agreement()
        self._profiler: Profiler  # made by `fit`
        self.activities, self.spikes = Activities(), SpikeGuard(config.spikes)
        self.start_recorder = StartRecorder(self.run.path, self.activities, mesh.is_main)
        self.rewinds = Rewinds(config.spikes, self.run.path, mesh, source.fingerprint)
        self.rows = StepRows(source, train, mesh, self.rewinds)
        check_source(source, config.spikes)
        if train.compile:  # torch would keep compiled code in a temporary folder, which a restart may not find
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.run.compiled.absolute()))
        sources, adapter = max(1, len(source.sources)), config.adapter
        self.engine = Engine(model_config, train, config.optimizer, mesh, config.run.seed, dtype, sources, adapter)
        self.engine.base = base_facts(self.config, self.lineage.init)
        self.corruption = CorruptionCheck(self.engine, mesh.device.type == "cpu" or train.deterministic)
        self.companion = companion(self) if companion else None
        self.beside = {self.companion.name: self.companion.engine} if self.companion else {}
        self._mfu_per_rate = mfu_per_rate(model_config, train.seq_length, mesh, dtype, config.log.measure_peak)

    def fit(self) -> int:
        """Trains until `train.steps` steps are done and returns the exit status.

        0: finished. 1: the last checkpoint could not be written, or training data is damaged. After a signal, once a
        checkpoint of the last step is saved: 75 for SIGTERM and SIGUSR1 (run the same command again), 130 for Ctrl-C.
        """
        with ExitStack() as stack:
            watch = stack.enter_context(signals.saving())
            stack.enter_context(self.run.hold(watch))
            watchdog = Watchdog(
                self.config.watchdog, self.engine, self.run.path, self.activities, self.start_recorder.hang
            )
            stack.enter_context(watchdog)
            saved = load_weights(self)
            if self.step >= self.config.train.steps:
                if saved and self.agreement.unchecked_from < self.step:
                    return self._check_finished(saved, watch)
                self.print(f"{self.run.path} is finished at step {self.step}; nothing to do")
                if self.mesh.is_main:
                    make_up(self.run.path, self.config.checkpoint, self.print)
                return 0
            self.run.begin_data_span(self.step, self.samples, self.print)
            self.agreement.first_step = self.step
            self.rows.prepare(self.engine, self.step)
            begin_to_write(self, saved)
            stack.enter_context(self.start_recorder.of_start(self.step))
            log = display = None
            if self.mesh.is_main:
                self.run.write_facts(self.identity)
                bases = [each.base for each in (self.engine, *self.beside.values())]
                keep_bases(self.run.path, bases, self.print, self.config.checkpoint.mirror)
                trackers = Trackers(self.config.tracking, self.run.path, self.run.full_config)
                log = MetricsLog(self.run.path, self.step, self.config.log.tensorboard, trackers)
                display = Display(self.title, self.step, self.config.train.steps)
                stack.callback(log.close)
                stack.callback(lambda: trackers.close(finished=self.step >= self.config.train.steps))
                stack.callback(display.close)
            steps = self._step_log(log, display)
            stack.callback(steps.close)
            say = partial(self._say, display)
            saver = stack.enter_context(
                Saver(self.engine, self.run.path, self.config.checkpoint, say, self.beside, self.run.local)
            )
            check = stack.enter_context(DataCheck(self.source.files(), self.mesh))
            self._profiler = stack.enter_context(Profiler(self.profiled, self.run.path, self.mesh, say))
            if self.profiled and self.step >= self.profiled.stop - 1:
                self.print(f"step {self.step} is done, and so are the steps of --profile: nothing is profiled")
            try:
                self.agreement.signal(self.step, check, watch)
                if self.spikes.rewinds and not self.mesh.gather_json(storage.steps(self.run.path))[0]:
                    saver.save_now(self.step, self._facts())  # so that there is one to go back to
                self.rows.start(stack, self.samples, self.config.train.steps - self.step)
                stopped_by = self._loop(steps, saver, check, watch)
            except DamagedTrainingData as error:
                say(f"error: {error}")
                return FAILED
            except SilentCorruption as error:
                say(f"error: {error}")
                return signals.CORRUPTED
            self.activities.begin(END, self.step)
            saver.wait()
            if saver.failure is not None:
                say(f"error: the checkpoint of step {self.step} could not be written; the run ends here: {saver.why}")
                return FAILED
            saver.wait_for_mirror(stopped=bool(stopped_by))
            if stopped_by:
                return self._stopped(stopped_by, say)
        if self.mesh.is_main:
            print(
                f"{self.title}: step {self.step}, {self.tokens:,} tokens, report in {run_report.write(self.run.path)}"
            )
        return 0

    def replay(self, step: int, recorder: StepRecorder) -> dict[str, Any]:
        """Takes the steps up to `step` as `fit` does, but writes nothing; returns the line of the last for the log.

        The last is taken with `recorder`. Raises FloatingPointError if its gradient norm is not finite, or that of a
        step before it.
        """
        load_weights(self)
        before = self._step_log(None, None)
        while self.step < step - 1:
            before.add(self._train_step())
        before.flush()
        self.loss_fn = recorder.loss
        with recorder:
            last = self._train_step()
        try:
            return last.record(self.source.sources, self.model_config, self._mfu_per_rate)
        except FloatingPointError as error:
            raise NonFiniteStep(last, str(error)) from None

    def _step_log(self, log: MetricsLog | None, display: Display | None) -> StepLog:
        return StepLog(
            log,
            display,
            self.config.log.every,
            self.config.train.steps,
            self.model_config,
            self.source.sources,
            self.tokens_by_source,
            self._mfu_per_rate,
            self.spikes,
            Stragglers.of_mesh(self.config.watchdog, self.mesh),
        )

    def _loop(self, steps: StepLog, saver: Saver, check: DataCheck, watch: signals.Watch) -> int:
        """Trains to the last step, logging, evaluating and saving; returns the signal that stopped it before, else 0.

        The last checkpoint may still be being written when it returns.
        """
        if self.step == 0 and self.config.eval.at_start:
            self.activities.begin(EVALUATION, self.step)
            self._evaluate(steps)
        config = self.config
        while self.step < config.train.steps:
            if self.source.can_be_awaited:
                self.activities.begin(PREPARATION, self.step + 1)
                say = partial(self._say, steps.display)
                if stopped_by := self.agreement.wait_for_rows(self.source, self.step, check, watch, say):
                    return stopped_by
            try:
                with self._profiler.step(self.step + 1):
                    done = self._train_step()
                self._profiler.end_step(self.step)
                steps.add(done)
                self.start_recorder.update(self.step)
                last = self.step == config.train.steps
                saving, stopped_by = last or config.checkpoint.is_due(self.step), 0
                if saving or self.agreement.is_due(self.step):
                    stopped_by = self.agreement.signal(self.step, check, watch)
                saving = saving or bool(stopped_by)
                evaluating = bool(self.evaluators) and (last or self.step % config.eval.every == 0)
                if saving:
                    self.activities.begin(SAVING, self.step)
                    done.more["save_copy_s"] = round(saver.copy(), 4)
                if saving or evaluating:  # so that the log has all steps of a checkpoint that is whole
                    steps.flush()
            except NonFiniteStep as failed:
                more = self.first_not_finite(failed.step.batches)
                remedy = "" if more.endswith(NOTHING) else "; lower optimizer.lr and run the command again"
                raise FloatingPointError(f"{failed}{more}{remedy}") from None
            except BadStep as bad:
                go_back(self, bad, steps, saver)
                continue
            if evaluating:
                self.activities.begin(EVALUATION, self.step)
                self._evaluate(steps)
            if last:
                self.activities.begin(END, self.step)
                say = partial(self._say, steps.display)
                stopped_by = stopped_by or self.agreement.wait_for_check(self.step, check, watch, say)
            if saving:
                self.activities.begin(SAVING, self.step)
                saver.start(self.step, self._facts(), ends=last or bool(stopped_by))
            if stopped_by and (not last or self.agreement.unchecked_from < self.step):
                self._profiler.finish()
                return stopped_by
        return 0

    def _train_step(self) -> Step:
        train, mesh = self.config.train, self.mesh
        timer, busy = StepTimer(mesh.device), BusyTime()
        lr = learning_rate(self.step, train.steps, self.config.optimizer.lr, self.config.schedule)
        self.activities.begin(PREPARATION, self.step + 1)
        with record_function(DATA):
            if (first := self.rewinds.first_of(self.samples, train.global_batch_size)) != self.samples:
                self.samples = first
                self.run.pass_over(self.step, first, self.print)
            self.rows.prepare(self.engine, self.step)
            batches = self.rows.next(self.samples)
        if (checks := self.config.checks.interval(self.config.parallel)) and (self.step + 1) % checks == 0:
            self.activities.begin(CHECKING, self.step + 1)
            self.corruption.compute_twice(self.step, batches, self.loss_fn)
            self.engine.after_backward = partial(self.corruption.compare_weights, self.step)
        self.activities.begin(TRAINING, self.step + 1)
        every, norm = self.config.log.detail_every, self.spikes.largest_norm(self.step + 1)
        detailed = every > 0 and (self.step + 1) % every == 0
        ends = not self.spikes.skips
        sums = self.engine.train_step(batches, self.loss_fn, lr, norm, detailed, failure_ends=ends)
        if checks:
            self.engine.after_backward = None
        more = self.companion.train_step(batches, self.step) if self.companion else {}
        timer.stop()
        self.engine.busy_seconds = busy.seconds()
        self.step += 1
        self.samples += train.global_batch_size
        batch_tokens = train.global_batch_size * train.seq_length
        self.tokens += batch_tokens
        return Step(
            number=self.step,
            tokens=self.tokens,
            batch_tokens=batch_tokens,
            samples=(self.samples - train.global_batch_size, self.samples),
            lr=lr,
            sums=sums,
            timer=timer,
            memory_bytes=peak_memory(mesh.device),
            source_metrics=self.rows.metrics(),
            batches=batches,
            more=more,
        )

    def first_not_finite(self, batches: Sequence[Batch]) -> str:
        """Computes the last step again, and describes the first tensor that is not finite. Collective."""
        self.activities.begin(CHECKING, self.step)
        found = first_not_finite(self.engine, batches, self.loss_fn, self.source.describe)
        return f"; {found}" if found else ""

    def _evaluate(self, steps: StepLog) -> None:
        results: dict[str, dict[str, float]] = {}
        for evaluator in self.evaluators:
            results |= evaluator(self.engine)
        if steps.log and steps.display and results:
            steps.log.write({"step": self.step, "eval": results})
            text = "; ".join(f"{name} " + " ".join(f"{k} {v:.4g}" for k, v in r.items()) for name, r in results.items())
            steps.display.say(f"{self.title} {self.step}: held out: {text}")

    def _facts(self) -> dict[str, Any]:
        """Returns the run's values for a checkpoint's manifest: counts, data spans, identity, config and layout."""
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "source": self.source.state(),
            "ledger": dict(self.tokens_by_source),  # a copy: the manifest is written while training goes on
            "data_spans": self.run.data_spans,
            "passed_over": self.rewinds.ranges,
            "identity": self.identity,
            "context": max(self.context, self.source.context(self.config.train.seq_length)),
            **self.lineage.facts,
            # Dropout is keyed by seed and sample number, so the seed and `samples` are the whole RNG state.
            "rng": {"seed": self.config.run.seed},
            "layout": str(self.mesh.layout),
            "origin": self.origin,
            "unchecked_from": self.agreement.unchecked_from,
            "spikes": self.spikes.state(),
            "config": self.run.full_config,
        }

    def _say(self, display: Display | None, text: str) -> None:
        if display:
            display.say(f"{self.title} {self.step}: {text}")

    def print(self, text: str) -> None:
        if self.mesh.is_main:
            print(f"{self.title}: {text}", flush=True)

    def _stopped(self, number: int, say: Callable[[str], None]) -> int:
        """Tells the user that signal `number` stopped the run and what to do next; returns the exit status."""
        next_time = "goes on from there"
        if self.step >= self.config.train.steps:
            next_time = "checks the training data against its checksums, which is all that is left to do"
        say(f"stopped by {signal.Signals(number).name} at step {self.step}; the same command {next_time}")
        return signals.status_of(number)

    def _check_finished(self, saved: Path, watch: signals.Watch) -> int:
        """Checks the data of a finished run, saved at `saved`, against its checksums; returns the exit status."""
        self.print(
            f"{self.run.path} is finished at step {self.step}, but its training data was not checked to the end; "
            "checking it against its checksums"
        )
        self.activities.begin(END, self.step)
        with DataCheck(self.source.files(), self.mesh) as check:
            try:
                if stopped_by := self.agreement.wait_for_check(self.step, check, watch, self.print):
                    return self._stopped(stopped_by, self.print)
            except DamagedTrainingData as error:
                self.print(f"error: {error}")
                return FAILED
        if self.mesh.is_main:
            (saved / storage.CHECKED).touch()
            self.print(f"the training data matches its checksums, report in {run_report.write(self.run.path)}")
        return 0
