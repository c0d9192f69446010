"""Batch source of online preference learning: pairs of completions that the model in training has just written.

In each step the model answers prompts several times; of the answers to a prompt the one with the highest score is
chosen, and the one with the lowest rejected (Guo et al. 2024, "Direct Language Model Alignment from Online AI
Feedback", with rewards in place of the judge). Prompts whose answers all score the same give no pair, and further ones
take their place. What a step samples depends on the seed and its number alone, so a run that goes on needs no state.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from configs.loader import Failure
from configs.preference import OnlineSection, PreferenceSection
from configs.train import TrainSection
from posttrain.preference import reference_logprobs
from posttrain.preference.group_packing import PackedRow
from posttrain.preference.preference_examples import rows_of_pairs
from posttrain.preference.preference_pairs import Dialogue, Pair
from posttrain.preference.trained_loss import PairPreference
from posttrain.rl.policy_copy import PolicyCopy
from posttrain.rl.reference_policy import ReferencePolicy
from posttrain.rl.rollout import Rollout
from posttrain.rl.rollout_source import SamplingPlan
from posttrain.rl.shared_sampling import sample_together
from posttrain.tasks.verifiable_tasks import made_from
from pretrain.checkpoint.lineage import Pin
from pretrain.data.batch_source import BatchSource
from pretrain.parallel.engine import Engine

NAME = "pairs"


class OnlinePreferenceSource(BatchSource):
    """Batch source whose rows are pairs of the policy's own completions, one pair a row."""

    num_samples, reads_ahead = None, False

    def __init__(
        self,
        sampling: SamplingPlan,
        online: OnlineSection,
        section: PreferenceSection,
        train: TrainSection,
        policy: PolicyCopy,
        initial: Pin,
    ) -> None:
        self.sampling, self.online, self.sources = sampling, online, [NAME]
        self.longest_text = sampling.longest
        self.loss = PairPreference(section)
        self._section, self._train, self._policy, self._initial = section, train, policy, initial
        self.fingerprint = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        self._reference: ReferencePolicy | None = None
        self._rows: list[PackedRow] = []
        self._dp_rank, self._metrics = 0, dict[str, tuple[float, float]]()

    @property
    def facts(self) -> dict[str, Any]:
        """Settings that decide which prompts a step may draw."""
        online, size = self.online, self._train.global_batch_size
        return {
            "task": self.sampling.task.facts,
            "online": {"completions": online.completions, "max_draws": online.max_draws, "pairs": size},
        }

    def by_keys(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        online = dict(facts.get("online", {}))
        return {"task": facts.get("task", {}), "train.global_batch_size": online.pop("pairs", None), "online": online}

    def state(self) -> dict[str, Any]:
        return {"rewards": rewards} if (rewards := made_from(self.sampling.task)) else {}

    @property
    def checkpoints(self) -> list[str]:
        judges = [facts["checkpoint"] for facts in made_from(self.sampling.task).values() if "checkpoint" in facts]
        return judges + ([self._initial.checkpoint] if self._section.has_reference else [])

    def prepare(self, engine: Engine, step: int) -> None:
        """Samples the pairs of a step and has the reference score them. Collective: all ranks call it."""
        self._dp_rank, wanted = engine.mesh.dp_rank, self._train.global_batch_size
        self._policy.refresh(engine)
        pairs: list[Pair] = []
        totals: dict[str, tuple[float, float]] = {}
        first = step * wanted * self.online.max_draws
        drawn = 0
        while len(pairs) < wanted and drawn < wanted * self.online.max_draws:
            count = min(wanted - len(pairs), wanted * self.online.max_draws - drawn)
            rollout = self._sampled(range(first + drawn, first + drawn + count))
            pairs += pairs_of(rollout)
            drawn += count
            for name, (total, number) in rollout.metrics().items():
                so_far = totals.get(name, (0.0, 0.0))
                totals[name] = so_far[0] + total, so_far[1] + number
        if not pairs:
            raise Failure(
                f"none of {drawn} prompts of step {step + 1} has completions of different scores, so there is no pair "
                "to learn from; choose an easier task, or raise online.completions, online.temperature or "
                "online.max_draws"
            )
        self._metrics = totals | {"pairs": (float(len(pairs)), 1.0), "drawn_prompts": (float(drawn), 1.0)}
        length, pad = self._train.seq_length, self.sampling.chat.tokenizer.pad_id
        rows = [rows_of_pairs([pair], length, pad)[0] for pair in pairs]
        if self._section.has_reference:
            if self._reference is None:
                self._reference = ReferencePolicy(engine, self._initial)
            with self._reference.loaded():
                known = reference_logprobs.compute(engine, rows)
            rows = reference_logprobs.with_reference(rows, known)
        # Rows without weight stand in place of pairs that are missing.
        empty = replace(rows[0], loss_mask=np.zeros_like(rows[0].loss_mask))
        self._rows = [*rows, *[empty] * (wanted - len(rows))]

    def rows(self, samples: range) -> list[PackedRow]:
        """Returns the rows of this data-parallel rank's share of the step that `prepare` was called for."""
        return self._rows[self._dp_rank * len(samples) :][: len(samples)]

    def step_metrics(self) -> dict[str, tuple[float, float]]:
        return self._metrics

    def _sampled(self, prompts: range) -> Rollout:
        """Samples the completions of some prompts."""
        size = self.online.completions
        numbers = range(prompts.start * size, prompts.stop * size)
        return sample_together(self._policy, self.sampling, numbers, size, self._train.seq_length)


def pairs_of(rollout: Rollout) -> list[Pair]:
    """Returns a pair of each group whose scores differ: the first completion of the highest and of the lowest score.

    Completions that could not be scored are left out.
    """
    found = []
    for group in np.arange(len(rollout)).reshape(-1, rollout.group_size):
        known = [i for i in group.tolist() if not np.isnan(rollout.scores[i])]
        if not known:
            continue
        best, worst = max(known, key=lambda i: rollout.scores[i]), min(known, key=lambda i: rollout.scores[i])
        if rollout.scores[best] > rollout.scores[worst]:
            found.append(Pair(str(rollout.prompts[best]), _dialogue(rollout, best), _dialogue(rollout, worst)))
    return found


def _dialogue(rollout: Rollout, i: int) -> Dialogue:
    length = int(rollout.lengths[i])
    tokens = np.append(rollout.tokens[i][:length], rollout.labels[i][length - 1]).astype(np.int64)
    return Dialogue(tokens, np.append(False, rollout.mask[i][:length]))


def check_room(longest: int, new_tokens: int, seq_length: int) -> None:
    """Raises ValueError if two completions of a prompt with `longest` tokens do not fit into a row."""
    needed = 2 * (longest + new_tokens)
    if needed > seq_length:
        raise ValueError(
            f"a pair has up to {needed} tokens, twice a prompt of {longest} and task.max_new_tokens = {new_tokens}, "
            f"and train.seq_length = {seq_length}; set train.seq_length={needed} or more"
        )
