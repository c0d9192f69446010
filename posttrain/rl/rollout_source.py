"""Batch source of reinforcement learning: samples rollouts with the current weights, and gives their rows to steps.

Each rollout is sampled by all ranks, which exchange it whole, so that every rank knows all rewards. What the trainer
says of it is then computed once: log-probabilities by the trainer's code if there is more than one update, those of the
reference if the divergence from it is charged, and advantages. A rollout that has several updates is recorded before
the first one (`rollout_file`), and a run that goes on in the middle of it reads it. Sampling and training take turns,
and no rollout is older than the weights before its first update, unless another command samples ahead (`ahead`).
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from configs.loader import ConfigError, Failure
from configs.model import ModelConfig
from configs.rl import EnvironmentConfig, RLSection
from configs.train import TrainSection
from data_pipeline.core.integrity import Expected
from data_pipeline.mixture import earlier
from posttrain.algorithms.aggregation import Aggregation, step_factor, token_weight
from posttrain.chat.format_interface import Chat
from posttrain.rl import rollout_file
from posttrain.rl.logprob_check import LogprobCheck
from posttrain.rl.phases import Phases
from posttrain.rl.policy_copy import PolicyCopy
from posttrain.rl.reference_policy import ReferencePolicy
from posttrain.rl.replaying import as_sampled, check_middle, check_replayed, check_staleness
from posttrain.rl.rollout import METRICS, PART, Rollout
from posttrain.rl.rollout_file import Recorded
from posttrain.rl.rollout_rows import RolloutRow, rollout_rows
from posttrain.rl.shared_sampling import sample_together
from posttrain.rl.text_rows import TextRows
from posttrain.rl.token_values import token_values
from posttrain.tasks.episode_environment import Environment, environments
from posttrain.tasks.task import Task
from posttrain.tasks.verifiable_tasks import made_from
from posttrain.tasks.verifiers_task import VerifiersTask
from pretrain.checkpoint import storage
from pretrain.checkpoint.lineage import Pin
from pretrain.data.batch_source import BatchSource
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Mesh
from pretrain.run.agreement import POLL_SECONDS

DRAWN = (*METRICS, "drawn_groups")  # metrics of all that was drawn, also of what was replaced
ROLLOUTS = "rollouts"  # folder in run.dir of the rollouts that a resume may need


class Credit(Protocol):
    """A way to give the tokens of a rollout advantages; `names` are those of the arrays that it adds to the rollout."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def __call__(self, rollout: Rollout, engine: Engine) -> Rollout: ...

    def equal_groups(self, rollout: Rollout) -> np.ndarray:
        """Returns bool [groups], True for those that nothing can be learned from, as their rewards are all equal."""
        ...


@dataclass(frozen=True)
class SamplingPlan:
    """The task whose prompts are sampled, and how; `seed` and the number of a sample fix its prompt and its draws.

    `longest` is the number of tokens that a prompt and its completion may have, None in an environment, where only an
    episode itself shows it, and `method` the section of the config that has `group_size`. `settled` are the settings,
    by their keys, that cannot change before all updates on a rollout are done.
    """

    task: Task
    chat: Chat
    group_size: int
    temperature: float
    seed: int
    environment: EnvironmentConfig | None = None
    longest: int | None = None
    method: str = "grpo"
    settled: Mapping[str, Any] = field(default_factory=dict)

    @property
    def make(self) -> Callable[[], Environment] | None:
        """Maker of the environment of an episode, None if the model's first turn is its answer."""
        if isinstance(self.task, VerifiersTask):
            return self.task.environment
        return environments(self.environment) if self.environment else None


class RolloutSource(BatchSource):
    """Batch source whose rows are completions sampled from the model in training.

    `reference` is the model from which divergence is measured. With `staleness` another command samples the rollouts
    that are replayed, so many ahead of training.
    """

    num_samples = None

    def __init__(
        self,
        sampling: SamplingPlan,
        settings: RLSection,
        train: TrainSection,
        run_dir: str | Path,
        credit: Credit,
        aggregation: Aggregation,
        policy: PolicyCopy,
        check: LogprobCheck,
        reference: Pin | None = None,
        text: TextRows | None = None,
        staleness: int = 0,
    ) -> None:
        self.staleness, self.can_be_awaited = staleness, bool(staleness and settings.replay)
        self.sampling, self.settings, self.credit, self.aggregation = sampling, settings, credit, aggregation
        self.policy, self.seq_length, self.folder = policy, train.seq_length, Path(run_dir, ROLLOUTS)
        self.phases = Phases(settings.rollout_batch, settings.epochs, train.global_batch_size, sampling.seed)
        self._text, self.sources = text, [sampling.task.name, *(["text"] if text else [])]
        self.longest_text = None if text else sampling.longest or 0
        # Covers what decides the prompts; other settings may change when a run continues, as the optimizer's may.
        self.fingerprint = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        self._check, self._initial = check, reference
        self._reference: ReferencePolicy | None = None
        self._rollout: Rollout | None = None
        self._mesh: Mesh | None = None
        self._next_prompt, self._sha256, self._step, self._metrics = 0, "", 0, dict[str, tuple[float, float]]()
        self._recomputes = self.phases.steps > 1 or settings.correction != "report"

    @property
    def facts(self) -> dict[str, Any]:
        """Settings that decide which prompt each sample has, and which step trains on which rollout."""
        found = {"task": self.sampling.task.facts, "grpo": {"group_size": self.sampling.group_size}}
        if self.sampling.environment:
            found["environment"] = self.sampling.environment.model_dump(mode="json")
        if self.phases.steps > 1:
            found["rl"] = {"rollout_batch": self.settings.rollout_batch, "epochs": self.settings.epochs}
        if self._text:
            plan = self._text.text.plan
            found["text"] = {"plan": f"{plan.num_samples:,} rows ({plan.fingerprint[:12]})"}
        return found

    def by_keys(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        found: dict[str, Any] = {"task": facts.get("task", {}), self.sampling.method: dict(facts.get("grpo", {}))}
        found["rl"] = {"rollout_batch": 1, "epochs": 1, **facts.get("rl", {})}
        if "environment" in facts:
            found["rl"]["environment"] = facts["environment"]
        if "text" in facts:
            found[self.sampling.method]["text_plan"] = facts["text"]["plan"]
        return found

    def files(self) -> list[Expected]:
        return self._text.text.plan.store_files() if self._text else []

    def note_use(self, run_dir: Path) -> None:
        if self._text:
            earlier.note_use(self._text.text.plan.path, run_dir)

    def state(self) -> dict[str, Any]:
        found = {"next_prompt": self._next_prompt, "rollout": self._sha256, "batch": self.phases.batch_size}
        found |= {"text_plan": self._text.text.plan.fingerprint} if self._text else {}
        return found | ({"rewards": rewards} if (rewards := made_from(self.sampling.task)) else {})

    @property
    def checkpoints(self) -> list[str]:
        judges = [facts["checkpoint"] for facts in made_from(self.sampling.task).values() if "checkpoint" in facts]
        return judges + ([self._initial.checkpoint] if self._initial and self.settings.kl != "none" else [])

    def go_on(self, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
        """Takes up the prompts where a checkpoint left them, and its rollout if that is not used up."""
        step, state = manifest["step"], manifest.get("source", {})
        self._next_prompt = state.get("next_prompt", manifest["samples"] // self.sampling.group_size)
        if self.phases.begins(step):
            return
        number = self.phases.rollout_of(step)
        check_middle(checkpoint, manifest, self.phases, self.sampling.settled)
        folder = storage.run_of(checkpoint) / ROLLOUTS
        before = number * self.phases.steps
        earlier_ones = "to begin again" if before == 0 else "to go on from before this rollout"
        otherwise = f"remove the checkpoints after step {before} in {checkpoint.parent} {earlier_ones}"
        recorded = rollout_file.read(folder, number, otherwise)
        if recorded.sha256 != state.get("rollout"):
            raise ConfigError(
                f"{rollout_file.path_of(folder, number)} is not the rollout that {checkpoint} was trained on, since "
                f"the run went on from an earlier checkpoint after it; restore the file, or {otherwise}"
            )
        self._rollout, self._metrics, self._sha256 = recorded.rollout, dict(recorded.metrics), recorded.sha256

    def is_awaited(self, step: int) -> bool:
        if not (self.can_be_awaited and self.settings.replay and self.phases.begins(step)):
            return False
        return not rollout_file.path_of(Path(self.settings.replay), self.phases.rollout_of(step)).exists()

    def prepare(self, engine: Engine, step: int) -> None:
        """Samples a rollout if step `step` begins one. Collective: all ranks call it."""
        self._step, self._mesh = step, engine.mesh
        number = self.phases.rollout_of(step)
        if self._rollout is None or self.phases.begins(step):
            self._rollout = None  # frees its memory
            self._begin(engine, number)
        elif engine.mesh.is_main and not rollout_file.path_of(self.folder, number).exists():
            self._recorded(number).write(self.folder)  # the run goes on from a checkpoint of another one

    def sample_only(self, engine: Engine, number: int) -> Rollout:
        """Samples, scores and returns rollout `number`, and goes on to the next prompts. Collective."""
        self.policy.refresh(engine)
        rollout, drawn = self._sampled()
        self._metrics = drawn
        return rollout

    def record_only(self, engine: Engine, number: int, folder: Path, step: int | None = None) -> Rollout:
        """Samples rollout `number` as `sample_only`, writes it into a folder, and returns it. Collective.

        Where sampling is ahead, `step` is the number of updates that the weights have had.
        """
        self._rollout = self.sample_only(engine, number)
        self._metrics = self._rollout.metrics() | self._metrics
        if engine.mesh.is_main:
            rollout_file.note_owner(folder, self.folder.parent)
            replace(self._recorded(number), step=step).write(folder)
        return self._rollout

    def go_on_after(self, folder: Path, number: int) -> None:
        """Takes up the prompts after those of the rollout `number` that is recorded in a folder."""
        self._next_prompt = rollout_file.read(folder, number, "remove it, to sample it again").next_prompt

    def _begin(self, engine: Engine, number: int) -> None:
        if self.settings.replay:
            rollout = self._replayed(number, engine.model_config)
        else:
            rollout = self.sample_only(engine, number)
        self._metrics = rollout.metrics() | self._metrics
        mesh = engine.mesh
        if mesh.is_main and bool(self.credit.equal_groups(rollout).all()):
            print(
                f"warning: all groups of rollout {number} have equal rewards, from which nothing can be learned; if it "
                "stays so, choose an easier task, a better model to start from, or a higher temperature",
                flush=True,
            )
        if self._recomputes or self._check.is_due:
            rows = rollout_rows(rollout, range(len(rollout)), replays_experts=True)
            old = token_values(engine, rows, self.sampling.temperature)
            if not (self.staleness and number):  # later ones come from weights that the trainer no longer has
                self._check((old - torch.from_numpy(rollout.rollout_logprobs)).abs(), torch.from_numpy(rollout.mask))
            rollout = rollout.plus(old_logprobs=old.numpy()) if self._recomputes else rollout
        if self.settings.kl != "none":
            if self._reference is None:
                assert self._initial is not None, "the divergence is measured from the run's initial model"
                self._reference = ReferencePolicy(engine, self._initial)
            rows = rollout_rows(rollout, range(len(rollout)))
            with self._reference.loaded():
                reference = token_values(engine, rows, self.sampling.temperature)
            self._metrics["kl_to_reference"] = _kl(rollout, reference)
            rollout = rollout.plus(ref_logprobs=reference.numpy())
        self._rollout = self.credit(rollout, engine)
        self._record(number, mesh.is_main)

    def _sampled(self) -> tuple[Rollout, dict[str, tuple[float, float]]]:
        """Samples the groups of a rollout from the next prompts: (rollout, what was drawn for it).

        Groups of equal rewards are replaced by those of further prompts, up to `rl.max_draws` times their number; if
        there are not enough by then, the first of them fill the rollout.
        """
        wanted = self.phases.samples // self.sampling.group_size
        budget = wanted * self.settings.max_draws
        useful: Rollout | None = None
        rest: Rollout | None = None
        drawn = equal = 0
        metrics: dict[str, tuple[float, float]] = {}
        while (missing := wanted - _groups(useful)) and drawn < budget:
            part = self._sampled_groups(min(missing, budget - drawn))
            is_equal = self.credit.equal_groups(part)
            for name, (total, count) in part.metrics().items():
                so_far = metrics.get(name, (0.0, 0.0))
                metrics[name] = so_far[0] + total, so_far[1] + count
            if len(set(metrics["unscorable"])) == 1:
                last, count = self._next_prompt - 1, int(metrics["unscorable"][1])
                raise Failure(
                    f"task {self.sampling.task.name!r} could score none of the {count} completions of prompts "
                    f"{last + 1 - len(is_equal)} to {last}; mend its reward, and run the same command again"
                )
            drawn, equal = drawn + len(is_equal), equal + int(is_equal.sum())
            if self.settings.max_draws == 1:
                useful = part
                break
            kept, others = (part.of_groups(np.flatnonzero(which).tolist()) for which in (~is_equal, is_equal))
            useful = kept if useful is None else useful.followed_by(kept)
            rest = others if rest is None else rest.followed_by(others)
        assert useful is not None
        if missing := wanted - _groups(useful):
            assert rest is not None
            useful = useful.followed_by(rest.of_groups(range(missing)))
        metrics["equal_reward_groups"] = float(equal), float(drawn)
        if self.settings.max_draws > 1:
            metrics["drawn_groups"] = (float(drawn), 1.0)
        return useful, metrics

    def _sampled_groups(self, count: int) -> Rollout:
        """Samples the groups of the next `count` prompts; each rank samples a share, and all get all."""
        sampling, first = self.sampling, self._next_prompt * self.sampling.group_size
        self._next_prompt += count
        numbers = range(first, first + count * sampling.group_size)
        return sample_together(
            self.policy,
            sampling,
            numbers,
            sampling.group_size,
            self.seq_length,
            make=sampling.make,
            keep_experts=self.settings.replay_experts and self.policy.text_sampler.choices != (0, 0),
        )

    def _replayed(self, number: int, model: ModelConfig) -> Rollout:
        assert self.settings.replay is not None
        while self.is_awaited(number * self.phases.steps):  # for the first rollout alone; see Agreement.wait_for_rows
            time.sleep(POLL_SECONDS)
        recorded = rollout_file.read(Path(self.settings.replay), number, "leave out rl.replay to sample new ones")
        sampling, keeps = self.sampling, self.settings.replay_experts
        samples = self.phases.samples, sampling.group_size, self.seq_length
        check_replayed(recorded, self.settings.replay, sampling.chat.tokenizer.sha256, *samples, sampling.method)
        if self.staleness:
            check_staleness(recorded, self.settings.replay, self.phases, self.staleness)
        self._next_prompt = recorded.next_prompt
        self._metrics = {name: m for name, m in recorded.metrics.items() if name in DRAWN or name.startswith(PART)}
        return as_sampled(recorded.rollout, number, model if keeps else None)

    def _record(self, number: int, writes: bool) -> None:
        """Writes the rollout where a resume finds it if it has several updates, and into `rl.record`."""
        recorded = self._recorded(number)
        self._sha256 = recorded.sha256 if self.phases.steps > 1 else ""
        if not writes:
            return
        folders = [self.folder] if self.phases.steps > 1 else []
        folders += [Path(self.settings.record)] if self.settings.record else []
        for folder in folders:
            if folder != self.folder:
                rollout_file.note_owner(folder, self.folder.parent)
            recorded.write(folder)
        if saved := storage.steps(self.folder.parent):  # the first checkpoint may still be being written
            rollout_file.remove_before(self.folder, self.phases.rollout_of(saved[0]))

    def _recorded(self, number: int) -> Recorded:
        assert self._rollout is not None
        return Recorded(self._rollout, number, self._next_prompt, self._metrics, self.sampling.chat.tokenizer.sha256)

    def rows(self, samples: range) -> list[RolloutRow]:
        """Returns the rows of this data-parallel rank's share of the step that `prepare` was called for."""
        rollout = self._rollout
        assert rollout is not None and self._mesh is not None, "the trainer calls prepare before it asks for rows"
        chosen = self.phases.minibatch(self._step)
        if self.longest_text is not None and self.sampling.longest is None:
            self.longest_text = max(self.longest_text, int(rollout.lengths[chosen].max()))
        lengths, scored = rollout.completion_lengths(), ~np.isnan(rollout.scores)
        weights = np.array([token_weight(int(n), self.aggregation) for n in np.maximum(lengths, 1)])
        trained = [i for i in chosen if scored[i]]
        most = self.sampling.task.max_new_tokens
        factor = step_factor(int(lengths[trained].sum()), len(trained), most, self.aggregation)
        text = self._text.of_step(self._step) if self._text else []
        learns = bool(trained or text)  # else, nothing of this step could be scored: all its tokens count, with loss 0
        weights = weights * scored if learns else weights
        weight = float((weights * lengths)[trained].sum())
        whole = weight + sum(float(row.loss_mask.sum()) for row in text)
        share = whole / weight if text and weight else float(learns)
        if text or factor * share != 1.0:
            everywhere = np.ones(rollout.mask.shape, np.float32)
            of_rollout = {"factor": factor * share * everywhere, "share": share * everywhere}
            rollout = rollout.plus(**of_rollout, **({"text_factor": 0 * everywhere} if text else {}))
        optional = ("old_logprobs", "ref_logprobs", "factor", "share", "text_factor")
        names = ["rollout_logprobs", *(name for name in optional if name in rollout.arrays), *self.credit.names]
        dp, dp_rank = self._mesh.layout.dp, self._mesh.dp_rank
        own = chosen[dp_rank * len(samples) :][: len(samples)]
        rows = rollout_rows(rollout, own, weights, names, replays_experts=True)
        if self._text:
            part = len(text) // dp
            rows += self._text.rows(text, names, whole, rows[0].experts)[dp_rank * part : (dp_rank + 1) * part]
        return rows

    def step_metrics(self) -> dict[str, tuple[float, float]]:
        """Returns (sum, count) of each metric of the rollout of the last rows; every rank has those of the whole."""
        return self._metrics


def _groups(rollout: Rollout | None) -> int:
    return 0 if rollout is None else len(rollout) // rollout.group_size


def _kl(rollout: Rollout, reference: torch.Tensor) -> tuple[float, float]:
    """Returns (sum, count) of the k1 estimate of the divergence from the reference, over sampled tokens."""
    policy = torch.from_numpy(rollout.arrays.get("old_logprobs", rollout.rollout_logprobs))
    mask = torch.from_numpy(rollout.mask)
    return float((policy - reference)[mask].double().sum()), float(mask.sum())
