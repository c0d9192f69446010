"""Batches of preferences with their reference log-probabilities, and the measurement on held-out ones."""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from configs.loader import ConfigError
from configs.preference import PreferenceSection
from posttrain.preference import reference_logprobs
from posttrain.preference.group_packing import PackedRow, PackedSource
from posttrain.preference.preference_examples import PreferenceRows
from posttrain.preference.preference_losses import kl_reference_point
from posttrain.preference.trained_loss import AnswerPreference, LogRatio, PairPreference
from pretrain.checkpoint import storage
from pretrain.data.batch_source import micro_batches, share_of_rank
from pretrain.heldout_loss import batches_of_rank
from pretrain.parallel.engine import Engine

NAME = "preferences"
PreferenceLoss = PairPreference | AnswerPreference


class PreferenceSource(PackedSource):
    """Batch source of preferences. Before the first step it has the engine compute the reference's log-probabilities.

    For KTO it measures before every step how far the policy is from the reference, on mismatched answers.
    """

    reads_ahead = False  # rows are there only after `prepare`

    def __init__(
        self, rows: PreferenceRows, section: PreferenceSection, seed: int, run_dir: str, model_sha256: str
    ) -> None:
        super().__init__(NAME, rows.train, seed)
        if rows.mismatched:
            digest = hashlib.sha256(self.fingerprint.encode())
            for row in rows.mismatched:
                digest.update(row.tokens.tobytes())
            self.fingerprint = digest.hexdigest()
        self.heldout, self._mismatched = rows.heldout, rows.mismatched
        self.loss: PreferenceLoss = (AnswerPreference if section.loss == "kto" else PairPreference)(section)
        held = hashlib.sha256(b"".join(row.tokens.tobytes() for row in rows.heldout)).hexdigest()
        self.file = reference_logprobs.file_of(run_dir, model_sha256, f"{self.fingerprint} {held}")
        self.has_reference = not section.has_reference
        self._found: np.ndarray | None = None

    def check_goes_on(self, checkpoint: Path) -> None:
        """Raises ConfigError if a run that goes on has lost the log-probabilities of its reference.

        A run that goes on from a checkpoint of another one, by --resume PATH, takes them from that one.
        """
        trained_on = storage.read_manifest(checkpoint).get("identity", {}).get("data")
        if not self.has_reference and trained_on == self.fingerprint:  # the trainer refuses other data, in words
            beside = storage.run_of(checkpoint) / self.file.parent.name / self.file.name
            self._found = reference_logprobs.load(self.file, self._shape)
            if self._found is None:
                self._found = reference_logprobs.load(beside, self._shape)
            self._check(self._found)

    def _check(self, known: np.ndarray | None) -> None:
        if known is None:
            raise ConfigError(
                f"{self.file} is missing or damaged, in which the run keeps the log-probabilities of its reference on "
                "these preferences, and which it cannot compute again from its own weights; restore the file, set "
                "preference.loss back if it had no reference, and data.heldout_share if it was changed, or choose "
                "another run.dir"
            )

    def prepare(self, engine: Engine, step: int) -> None:
        """Gives rows their reference log-probabilities if they lack them and, for KTO, the loss its reference point."""
        if not self.has_reference:
            self._take_reference(engine, step)
            self.has_reference = True
        if isinstance(self.loss, AnswerPreference):
            self.loss.reference_point = self._reference_point(engine, step)

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self._rows) + len(self._mismatched) + len(self.heldout), len(self._rows[0].tokens)

    def _take_reference(self, engine: Engine, step: int) -> None:
        """Loads log-probabilities of all rows or, in a run that begins, computes and publishes them."""
        rows = [*self._rows, *self._mismatched, *self.heldout]
        known = reference_logprobs.load(self.file, self._shape)
        if step > 0:
            if known is None and self._found is not None and engine.mesh.is_main:
                reference_logprobs.save(self.file, self._found)
            known = self._found if known is None else known
            self._check(known)
        elif not all(engine.mesh.gather_json(known is not None)):
            with engine.without_adapters() if engine.adapters_are_new else nullcontext():
                known = reference_logprobs.compute(engine, rows)
            if engine.mesh.is_main:
                reference_logprobs.save(self.file, known)
            engine.mesh.gather_json(None)  # no rank goes on before the file is there
        assert known is not None
        rows = reference_logprobs.with_reference(rows, known)
        first, second = len(self._rows), len(self._rows) + len(self._mismatched)
        self._rows, self._mismatched, self.heldout = rows[:first], rows[first:second], rows[second:]

    def _reference_point(self, engine: Engine, step: int) -> float:
        """Returns KTO's z0 of a step: the mean log-ratio of its mismatched answers over all ranks, at least 0."""
        train, mesh = engine.train_config, engine.mesh
        share = share_of_rank(step * train.global_batch_size, train.global_batch_size, mesh.dp_rank, mesh.layout.dp)
        rows = PackedSource(NAME, self._mismatched, self.seed).rows(share)  # in the order of the rows themselves
        sums = engine.evaluate(micro_batches(rows, train.micro_batch_size), LogRatio())
        return kl_reference_point(sums.metrics["logratio"])


class HeldoutPreference:
    """Evaluator of held-out preferences: the loss, rewards, and the share in which the chosen answer has the higher."""

    def __init__(self, source: PreferenceSource, limit: int) -> None:
        self.source, self.limit = source, limit

    def __call__(self, engine: Engine) -> dict[str, dict[str, float]]:
        rows: Sequence[PackedRow] = self.source.heldout[: self.limit]
        if not rows:
            return {}
        sums = engine.evaluate(batches_of_rank(rows, engine), self.source.loss)
        kept = {name.removeprefix("rewards/"): value for name, value in sums.metrics.items() if "rewards" in name}
        return {NAME: {"loss": sums.mean_loss, **kept}}
