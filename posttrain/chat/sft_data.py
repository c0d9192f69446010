"""SFT data: examples packed into rows with document masks, and the order in which rows are trained on.

All dialogues are held in memory. Each source is packed into rows of its own by best fit. Rows of all sources are
visited in a new random order each epoch; rows of pretraining text are put between them at even distances. So
sample i is a pure function of (data, seed, i). In dialogues the loss is on assistant turns only, in text on every
token. Sources of dialogues have no weights: give a source more examples instead.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from configs.differences import changes, words
from configs.files import write_atomic
from data_pipeline.core.integrity import Expected
from data_pipeline.mixture import earlier
from data_pipeline.mixture.packing import best_fit
from data_pipeline.mixture.rows import Row
from posttrain.chat.dialogues import Example
from posttrain.pretraining_text import PretrainingText
from posttrain.records import Records
from pretrain.data.batch_source import BatchSource, in_random_order, longest_in
from pretrain.report.mask_page import FILE


def pack(examples: Sequence[Example], seq_length: int, pad_id: int, source: int) -> list[Row]:
    """Packs whole examples into rows of `seq_length` tokens, each example a segment of its own."""
    bins = best_fit([len(example.tokens) for example in examples], seq_length)
    return [_row([examples[i] for i in members], seq_length, pad_id, source) for members in bins]


def _row(examples: Sequence[Example], seq_length: int, pad_id: int, source: int) -> Row:
    tokens = np.full(seq_length, pad_id, dtype=np.int64)
    labels, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    segments = np.full(seq_length, -1, dtype=np.int64)
    loss_mask = np.zeros(seq_length, dtype=bool)
    start = 0
    for segment, example in enumerate(examples):
        length = len(example.tokens)
        end = start + length
        tokens[start:end] = example.tokens
        loss_mask[start : end - 1] = example.answer[1:]  # position t predicts token t + 1
        labels[start : end - 1] = np.where(example.answer[1:], example.tokens[1:], 0)
        positions[start:end] = np.arange(length)
        segments[start:end] = segment
        start = end
    return Row(tokens, labels, loss_mask, positions, segments, source)


@dataclass(frozen=True)
class TextShare:
    """Rows of pretraining text that are the share `weight` of all rows, at even distances."""

    text: PretrainingText
    weight: float

    def before(self, sample: int) -> int:
        """Returns how many of the samples before `sample` are text."""
        share = Fraction(str(self.weight))  # as it is written, so that no rounding moves a row
        return sample * share.numerator // share.denominator

    def heldout(self, limit: int) -> dict[str, Sequence[Row]]:
        """Returns the first `limit` held-out rows of each of the plan's sources, by the names of the run's sources."""
        plan = self.text.plan
        return {
            f"text {name}": [plan.heldout_row(name, i) for i in range(min(limit, plan.heldout_rows(name)))]
            for name in plan.sources
        }


class SFTSource(BatchSource):
    """Batch source of the packed rows of all sources; it never ends, as epochs follow one another.

    Sources of text come after those of dialogues.
    """

    num_samples, reads_ahead = None, True

    def __init__(
        self,
        examples: Mapping[str, Records[Example]],
        seq_length: int,
        pad_id: int,
        seed: int,
        masks: Mapping[str, Any] | None = None,
        text: TextShare | None = None,
    ) -> None:
        """Packs the examples. `masks` is what the run's report shows of their loss masks, see `mask_xray`."""
        self.seed, self._masks, self._text = seed, masks, text
        self.sources, self._first_of_text = [*examples, *(text.heldout(0) if text else [])], len(examples)
        packed = [pack(found.train, seq_length, pad_id, i) for i, found in enumerate(examples.values())]
        self._rows = [row for rows in packed for row in rows]
        self._heldout = {
            name: pack(found.heldout, seq_length, pad_id, i) for i, (name, found) in enumerate(examples.items())
        }
        self.longest_text = None if text else longest_in(self._rows)
        self.fingerprint = _fingerprint(self._rows, seed, text)
        self._facts: dict[str, Any] = {
            name: f"{len(found.train)} examples ({_fingerprint(rows, seed)[:8]})"
            for (name, found), rows in zip(examples.items(), packed, strict=True)
        }
        if text:
            self._facts["text"] = {"weight": text.weight, **text.text.plan.facts}

    @property
    def facts(self) -> dict[str, Any]:
        """Number of examples and hash of the rows of each source, and what is known of the text."""
        return self._facts

    def difference(self, before: Mapping[str, Any]) -> str:
        ours, theirs = self._facts.get("text"), before.get("text")
        if ours == theirs:
            return super().difference(before)
        said = ["its rows of text (data.text_plan) are new" if ours else "its rows of text (data.text_plan) are gone"]
        if ours and theirs:
            said = words(changes({"data.text_weight": theirs["weight"]}, {"data.text_weight": ours["weight"]}))
            if {**ours, "weight": 0} != {**theirs, "weight": 0}:
                said.append(f"data.text_plan: {earlier.differences(theirs, ours)}")
        dialogues = {key: value for key, value in before.items() if key != "text"}
        if dialogues != {key: value for key, value in self._facts.items() if key != "text"}:
            said.insert(0, super().difference({**dialogues, "text": ours} if ours else dialogues))
        return "; ".join(said)

    @property
    def rows_per_epoch(self) -> int:
        """Number of packed rows of all sources of dialogues."""
        return len(self._rows)

    def epochs(self, samples: int) -> str:
        """Says how often `samples` samples go through the rows."""
        texts = self._text.before(samples) if self._text else 0
        said = f"{(samples - texts) / len(self._rows):.2f} epochs"
        if self._text:
            share = texts / self._text.text.plan.num_samples
            said += f" of the dialogues, and {texts} rows of text are {share:.2f} epochs of {self._text.text.key}"
        return said

    def heldout(self, limit: int) -> dict[str, Sequence[Row]]:
        """Returns the first `limit` held-out rows of each source."""
        found: dict[str, Sequence[Row]] = {name: rows[:limit] for name, rows in self._heldout.items()}
        return found | (self._text.heldout(limit) if self._text else {})

    def files(self) -> list[Expected]:
        return self._text.text.plan.store_files() if self._text else []

    def state(self) -> dict[str, Any]:
        return {"text_plan": self._text.text.plan.fingerprint} if self._text else {}

    def note_use(self, run_dir: Path) -> None:
        """Writes into the run's folder what its report shows of the loss masks, and a note beside the plan of text."""
        if self._masks:
            write_atomic(run_dir / FILE, json.dumps(self._masks, ensure_ascii=False).encode(errors="replace"))
        if self._text:
            earlier.note_use(self._text.text.plan.path, run_dir)

    def rows(self, samples: range) -> list[Row]:
        """Returns the rows of `samples`, which count through all epochs."""
        text = self._text
        if text is None:
            return in_random_order(self._rows, samples, self.seed)
        begin, end = text.before(samples.start), text.before(samples.stop)
        dialogues = iter(in_random_order(self._rows, range(samples.start - begin, samples.stop - end), self.seed))
        return [
            self._text_row(text, text.before(i)) if text.before(i + 1) > text.before(i) else next(dialogues)
            for i in samples
        ]

    def _text_row(self, text: TextShare, number: int) -> Row:
        row = text.text.row(number)
        return replace(row, source=self._first_of_text + row.source)


def _fingerprint(rows: Iterable[Row], seed: int, text: TextShare | None = None) -> str:
    digest = hashlib.sha256(f"seed {seed}".encode())
    for row in rows:
        digest.update(row.tokens.tobytes() + row.loss_mask.tobytes() + row.segments.tobytes())
    if text:
        digest.update(f"text {text.weight} {text.text.plan.fingerprint}".encode())
    return digest.hexdigest()
