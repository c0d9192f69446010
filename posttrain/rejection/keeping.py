"""The choice of the completions that are kept: those of one prompt are judged together, the best first.

The first rule that a completion breaks is the reason by which it is counted. Completions that cannot be judged, or were
cut before their end, are never kept.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from configs.sample import KeepSection
from posttrain.rejection.samples import DrawnSample
from posttrain.rejection.text_measures import jaccard, longest_paragraph, word_ngrams
from posttrain.rewards.script import script_share

SHOWN = 80  # characters of a completion in messages
CUT, UNSCORABLE = "cut before the end of its turn", "unscorable"  # reasons that no rule of [keep] gives


@dataclass
class NotKept:
    """Completions that are not kept: counts by reason, and the first of each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, sample: DrawnSample) -> None:
        """Counts one completion."""
        self.counts[reason] += 1
        self.first.setdefault(reason, f"{sample.name}: {sample.text[:SHOWN]!r}")

    def lines(self) -> list[str]:
        """Returns a line for each reason, the commonest first."""
        return [f"{count:,} {reason} (first: {self.first[reason]})" for reason, count in self._ordered()]

    def remedy(self) -> str:
        """Returns advice on the commonest reason for which completions are not kept."""
        reason = self._ordered()[0][0]
        if rule := re.search(r"keep\.\w+(\.\w+)?", reason):
            return f"loosen {rule[0]} and run the same command again, which keeps the samples"
        if reason == CUT:
            return "raise task.max_new_tokens, and choose another run.dir for the new samples, or take another model"
        if reason.startswith(UNSCORABLE):
            return "correct the reward, and choose another run.dir for the new samples"
        return "choose another model or sample.temperature, and another run.dir for the new samples"

    def _ordered(self) -> list[tuple[str, int]]:
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))


# Returns why a completion cannot be a dialogue, or None.
Check = Callable[[DrawnSample], str | None]


def kept_of_prompt(
    samples: Sequence[DrawnSample], keep: KeepSection, scored: bool, check: Check, set_aside: NotKept
) -> list[DrawnSample]:
    """Returns the completions of one prompt that are kept, the best first; counts the others in `set_aside`.

    `scored` says whether completions have scores. Of equal scores the lower sample number comes first.
    """
    usable = []
    for sample in samples:
        reason = fault(sample, keep, scored)
        if reason is None:
            usable.append(sample)
        else:
            set_aside.add(reason, sample)
    usable.sort(key=lambda sample: (-(sample.score or 0.0), sample.number))
    kept: list[DrawnSample] = []
    texts, ngrams = set[str](), list[np.ndarray]()
    for sample in usable:
        own = word_ngrams(sample.text) if keep.near_duplicates is not None else np.zeros(0, np.uint64)
        if sample.text.strip() in texts:
            set_aside.add("equal to a better one of its prompt", sample)
        elif keep.near_duplicates is not None and any(jaccard(own, other) >= keep.near_duplicates for other in ngrams):
            set_aside.add("near-duplicate of a better one of its prompt", sample)
        elif keep.per_prompt is not None and len(kept) == keep.per_prompt:
            set_aside.add(f"beyond keep.per_prompt = {keep.per_prompt}", sample)
        elif reason := check(sample):
            set_aside.add(reason, sample)
        else:
            texts.add(sample.text.strip())
            ngrams.append(own)
            kept.append(sample)
    return kept


def fault(sample: DrawnSample, keep: KeepSection, scored: bool) -> str | None:
    """Returns why a completion is not kept, whatever the others of its prompt are, or None."""
    text = sample.text
    if not sample.stopped:
        return CUT
    if not text.strip():
        return "empty"
    if scored and sample.score is None:
        return f"{UNSCORABLE}: {sample.reason}"
    if keep.min_score is not None and (sample.score is None or sample.score < keep.min_score):
        return f"score below keep.min_score = {keep.min_score:g}"
    for name, least in keep.min_rewards.items():
        if sample.rewards.get(name, -np.inf) < least:
            return f"reward below keep.min_rewards.{name} = {least:g}"
    if sample.tokens < keep.min_tokens:
        return f"shorter than keep.min_tokens = {keep.min_tokens}"
    if keep.max_tokens is not None and sample.tokens > keep.max_tokens:
        return f"longer than keep.max_tokens = {keep.max_tokens}"
    if keep.max_repeated is not None and sample.repeated > keep.max_repeated:
        return f"repetition above keep.max_repeated = {keep.max_repeated:g}"
    if keep.min_script is not None and script_share(text) < keep.min_script:
        return f"mixed scripts, below keep.min_script = {keep.min_script:g}"
    if keep.max_paragraph is not None and longest_paragraph(text) > keep.max_paragraph:
        return f"a paragraph longer than keep.max_paragraph = {keep.max_paragraph}"
    if not keep.code_blocks and "```" in text:
        return "a block of code, and keep.code_blocks = false"
    return None
