"""A run of rejection sampling: opens model and prompts, samples what is missing, and publishes the dialogues."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from signal import Signals
from typing import IO, Any

import torch
import torch.distributed as dist

from configs import signals
from configs.initial import InitConfig
from configs.loader import ConfigError, plain
from configs.run_lock import locked
from configs.sample import SampleConfig
from launch.environment import ClusterEnvironment
from posttrain.initial_chat_model import InitialChatModel
from posttrain.rejection.keeping import NotKept
from posttrain.rejection.kept_dialogues import DIALOGUES, Counts, publish
from posttrain.rejection.prompts import Prompts, open_prompts
from posttrain.rejection.samples import DrawnSample, SampleFiles, check_facts, recorded_facts, write_facts
from posttrain.rejection.writer import Writer, layout_of, opened_writer, said_of
from posttrain.tasks.verifiable_tasks import made_from
from pretrain.checkpoint import storage
from pretrain.checkpoint.lineage import text_sha256
from pretrain.checkpoint.storage import CheckpointError
from pretrain.parallel.groups import Mesh

NOTHING_KEPT = 1


class SampleRunner:
    """A run of rejection sampling on this rank."""

    def __init__(self, config: SampleConfig, env: ClusterEnvironment) -> None:
        """Checks model, task and layout before ranks join. Raises ConfigError if they do not fit together."""
        self.config, self.env, self.folder = config, env, Path(config.run.dir)
        self.name = self.folder.name
        if storage.steps(self.folder):
            raise ConfigError(
                f"run.dir = {config.run.dir!r} holds the checkpoints of a training run; choose another folder for the "
                "samples"
            )
        before = recorded_facts(self.folder)
        self.initial = InitialChatModel.open(self._init(before), config.run.dir, "auto", keeps_modules=True)
        self.layout = layout_of(config, self.initial.model, env.world_size)
        self.context = self.initial.lineage.context or None
        self.prompts = open_prompts(config, self.initial.chat, self.context, before.get("rewards"))
        self._check_names(self.prompts)
        self.facts = self._facts()
        check_facts(self.folder, before, self.facts)
        options = config.sample
        self.files = SampleFiles(self.folder, len(self.prompts.items), options.completions, options.part)

    def run(self, dry_run: bool = False) -> int:
        """Samples and publishes; returns the exit status."""
        said = said_of(self.prompts.items, self.config.sample.completions)
        repeated = f", {self.prompts.repeated:,} repeated prompts left out" if self.prompts.repeated else ""
        notes = [f"note: {self.initial.note}"] if self.initial.note else []
        self._say("\n".join([*notes, *self.prompts.notes, f"{said}{repeated}, by {self.initial.pin.checkpoint}"]))
        if dry_run:
            return 0
        with ExitStack() as stack:
            watch = stack.enter_context(signals.saving())
            writer = stack.enter_context(opened_writer(self.config, self.initial, self.env, self.layout))
            stack.enter_context(_held(self.folder, writer.mesh))
            if number := self._sample(writer, watch):
                self._say(f"stopped by {Signals(number).name}; the same command goes on with the prompts that are left")
                return signals.status_of(number)
            return self._publish(writer.mesh)

    def _sample(self, writer: Writer, watch: signals.Watch) -> int:
        """Samples the parts that are missing; returns the signal that stopped it before the end, else 0."""
        mesh, missing = writer.mesh, mesh_agreed(writer.mesh, self.files.missing())
        if missing and mesh.is_main:
            write_facts(self.folder, self.facts)
        prompts = len(self.prompts.items) - sum(len(self.files.parts[part]) for part in missing)
        tokens, began = 0, time.monotonic()
        for part in missing:
            found = writer.samples(self.config, self.prompts, self.files.parts[part])
            if mesh.is_main:
                self.files.write(part, found)
            watch.agree()
            number = torch.tensor([watch.number])
            dist.all_reduce(number, op=dist.ReduceOp.MAX)  # on the host
            watch.work()
            if mesh.is_main:
                prompts += len(self.files.parts[part])
                tokens += sum(sample.tokens for sample in found)
                speed = tokens / (time.monotonic() - began)
                self._say(f"{prompts:,} of {len(self.prompts.items):,} prompts{_mean(found)}, {speed:,.0f} tokens/s")
            if int(number) and part != missing[-1]:
                return int(number)
        return 0

    def _publish(self, mesh: Mesh) -> int:
        """Writes the dialogues on the main rank; returns the exit status, the same on all ranks."""
        kept = 0
        if mesh.is_main:
            counts, set_aside = publish(
                self.config, self.files, self.prompts, self.initial.chat, self.facts, self.context
            )
            kept = counts.kept
            self._say("\n".join(_lines(counts, set_aside, self.config, self.folder)))
        return 0 if mesh_agreed(mesh, kept) else NOTHING_KEPT

    def _init(self, before: dict[str, Any]) -> InitConfig:
        """Returns the model to open: a run that goes on keeps to the checkpoint with which it began."""
        init, begun = self.config.init, Path(before.get("model", {}).get("path", ""))
        if not before or init.run is None or not begun.is_dir():
            return init
        if storage.run_of(begun) != Path(init.run).resolve():
            return init
        with suppress(CheckpointError):
            if storage.latest(Path(init.run)).resolve() != begun:
                self._say(f"going on with {begun}, with which the samples began, and not with a newer checkpoint")
        return InitConfig(checkpoint=str(begun), tokenizer=init.tokenizer)

    def _check_names(self, prompts: Prompts) -> None:
        names = prompts.task.reward_names
        for name in self.config.keep.min_rewards:
            if name not in names:
                has = f"has the rewards {', '.join(names)}" if names else "has no rewards by name; set keep.min_score"
                raise ConfigError(f"keep.min_rewards.{name}: the task {prompts.task.name!r} {has}")

    def _facts(self) -> dict[str, Any]:
        """Returns, as JSON values, the facts on which samples depend, such as model, task and seed."""
        config, initial = self.config, self.initial
        assert initial.tokenizer is not None
        drawn = plain(config.sample)
        del drawn["batch_size"]
        problems = drawn.pop("problems", None)
        settings = {key: value for key, value in plain(config.task).items() if key != "eval_prompts"}
        return {
            "model": {"sha256": initial.pin.sha256, "path": initial.pin.checkpoint},
            "tokenizer": initial.tokenizer.sha256,
            "chat_template": text_sha256(initial.chat.template),
            "seed": config.run.seed,
            "problems": problems,
            "sample": drawn,
            "task": {**self.prompts.task.facts, "config": settings},
            **({"rewards": rewards} if (rewards := made_from(self.prompts.task)) else {}),
        }

    def _say(self, text: str) -> None:
        if self.env.is_main:
            print("\n".join(f"{self.name}: {line}" for line in text.splitlines()), flush=True)


def mesh_agreed(mesh: Mesh, value: Any) -> Any:
    """Returns the main rank's value, of JSON's types, on all ranks. Collective."""
    return mesh.gather_json(value if mesh.is_main else None)[0]


@contextmanager
def _held(folder: Path, mesh: Mesh) -> Iterator[None]:
    """Context that holds the folder's lock. Raises ConfigError on all ranks if another process holds it."""
    with ExitStack() as stack:
        lock = stack.enter_context(locked(folder, _take)) if mesh.is_main else None
        if not mesh_agreed(mesh, lock is not None):
            raise ConfigError(f"another process is sampling into {folder}; wait for it, or choose another run.dir")
        yield


def _take(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _mean(samples: list[DrawnSample]) -> str:
    scores = [sample.score for sample in samples if sample.score is not None]
    return f", mean score of the last ones {sum(scores) / len(scores):.3f}" if scores else ""


def _lines(counts: Counts, set_aside: NotKept, config: SampleConfig, folder: Path) -> list[str]:
    """Returns the lines that are printed at the end: how many samples were kept, and why others were not."""
    lines = [f"set aside: {line}" for line in set_aside.lines()]
    if not counts.kept:
        return [
            *lines,
            f"error: none of {counts.samples:,} samples is kept, so there are no dialogues; {set_aside.remedy()}",
        ]
    measured = counts.measures(config.task.is_scored)
    if "score" in measured:
        lines.append(f"mean score {measured['score']:.3f}, of each prompt's best {measured['best_score']:.3f}")
    spread = ", ".join(f"{n}: {count:,}" for n, count in sorted(counts.solved.items()))
    return [
        *lines,
        f"prompts by the number of completions kept: {spread}",
        f"{counts.kept:,} of {counts.samples:,} samples kept, of {counts.prompts - counts.solved[0]:,} of "
        f"{counts.prompts:,} prompts: {folder / DIALOGUES}",
    ]
