"""What a post-training run starts from: a checkpoint, the shape of its model, its tokenizer, and the chat format.

A run keeps to the checkpoint that it began from: every manifest of its own names it, so that the run goes on whatever
has become of the other run since. Leaves out reading weights: the trainer does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.files import file_sha256
from configs.layout import CAPACITY_FACTOR, SEQ_LENGTH
from configs.loader import ConfigError, validate
from configs.posttrain import InitConfig
from configs.train import ModelConfig
from data_pipeline.tokens.tokenizer import MODEL_FILE, Tokenizer
from posttrain.chat_format import ChatFormat, jinja_template
from pretrain.checkpoint import storage
from pretrain.checkpoint.lineage import Lineage, Pin, PlanLocation, plan_of, text_sha256, tokenizer_of
from pretrain.checkpoint.storage import CheckpointError


@dataclass(frozen=True)
class InitialModel:
    """`pin` is the checkpoint, `note` what a person has to be told of the choice, if anything.

    `goes_on` is whether the run has a checkpoint of its own already.
    """

    pin: Pin
    model: ModelConfig
    chat: ChatFormat
    lineage: Lineage
    note: str | None = None
    goes_on: bool = False

    @property
    def given(self) -> tuple[str, ...]:
        """Keys whose value this run cannot choose, since its model and its earlier steps have it."""
        return (CAPACITY_FACTOR, SEQ_LENGTH) if self.goes_on else (CAPACITY_FACTOR,)

    @classmethod
    def open(cls, init: InitConfig, run_dir: str, resume: str) -> "InitialModel":
        """Of the run in `run_dir` with this --resume, new or not. Writes nothing.

        Errors: ConfigError if there is no whole checkpoint or no tokenizer, the two do not go together, or the run
        began from another model than `init` names.
        """
        own = _going_on(Path(run_dir), resume)
        if own is None:
            checkpoint, note = _chosen(init), None
            pin = Pin.of(checkpoint)
        else:
            checkpoint = own
            pin, note = _pinned(own, init, run_dir)
        manifest = storage.read_manifest(checkpoint)
        model = validate(ModelConfig, manifest["config"]["model"], origin=f"model of {checkpoint}")
        if manifest.get("identity", {}).get("chat_template") not in (None, text_sha256(template := jinja_template())):
            raise ConfigError(
                f"{_named(init)}: {checkpoint} was trained on another chat format than this version of Trivium has; "
                "use the version that trained it, or start from a pretraining run"
            )
        try:
            tokenizer = _tokenizer(init, checkpoint, manifest, new=own is None)
            chat = ChatFormat(Tokenizer.load(tokenizer))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error) if own else f"{_named(init)}: {error}") from None
        plan = plan_of(manifest)
        if plan is not None:
            path = plan.find(storage.run_of(checkpoint)) or Path(plan.path)
            plan = PlanLocation.of(path, plan.fingerprint, Path(run_dir))
        return cls(
            pin, model, chat, Lineage(tokenizer, template, manifest.get("context", 0), plan, pin), note, own is not None
        )


def _going_on(run_dir: Path, resume: str) -> Path | None:
    """A checkpoint of the run that goes on, None for a new run. Which one is all the same: they have one beginning."""
    own = [storage.directory(run_dir, step) for step in reversed(storage.steps(run_dir))]
    for path in [*own, *([] if resume in ("auto", "no") else [Path(resume)])]:
        try:
            storage.read_manifest(path)
        except CheckpointError:
            continue  # the trainer says what is wrong with it
        return path
    return None


def _chosen(init: InitConfig) -> Path:
    """The whole checkpoint that `init` names. Errors: ConfigError."""
    path = Path(init.checkpoint or init.run or "")
    try:
        if init.checkpoint is None:
            if (path / storage.MANIFEST).is_file():
                raise ConfigError(
                    f"init.run = {init.run!r} is a checkpoint, not a run; set init.checkpoint={init.run} and leave "
                    "init.run out (as an override: init.run=)"
                )
            return storage.latest(path)
        if (path / "checkpoints").is_dir():
            own = [str(storage.directory(path, step)) for step in storage.steps(path)[-1:]]
            remedy = f"set init.checkpoint={own[0]}" if own else "it has none yet, so train first"
            raise ConfigError(f"init.checkpoint = {init.checkpoint!r} is a run, not a checkpoint; {remedy}")
        if not path.is_dir():
            saved = ", ".join(f"step_{step}" for step in storage.steps(path.parent.parent))
            raise ConfigError(
                f"init.checkpoint = {init.checkpoint!r} does not exist; checkpoints in {path.parent} are "
                f"{saved or 'none'}"
            )
        storage.verify(path)
    except CheckpointError as error:
        raise ConfigError(f"{_named(init)}: {error}") from None
    return path


def _pinned(own: Path, init: InitConfig, run_dir: str) -> tuple[Pin, str | None]:
    """What the run of checkpoint `own` began from, and what to say if `init` has something newer.

    Errors: ConfigError where `init` names another model.
    """
    manifest = storage.read_manifest(own)
    if not manifest.get("init"):
        raise ConfigError(f"run.dir = {run_dir!r} holds {own}, which is of a pretraining run; choose another run.dir")
    pin = Pin(**manifest["init"])
    begun = f"{run_dir} began from {pin.checkpoint}"
    if init.checkpoint is not None:
        named = Path(init.checkpoint)
        if _is(named, pin):
            return pin, None
        if (named / storage.MANIFEST).is_file():
            raise ConfigError(
                f"{begun}, and init.checkpoint = {init.checkpoint!r} is another; name the first, or choose another "
                "run.dir to start anew"
            )
        return pin, f"{begun} and goes on from its own weights; init.checkpoint = {init.checkpoint!r} is gone"
    assert init.run is not None
    run = Path(init.run)
    same, steps = storage.directory(run, pin.step), storage.steps(run)
    if not steps:
        return pin, f"{begun} and goes on from its own weights; init.run = {init.run!r} has no checkpoint any more"
    if not _is(same, pin) and run.resolve() != pin.run and init.run != manifest["config"]["init"].get("run"):
        raise ConfigError(
            f"{begun}, which init.run = {init.run!r} does not hold; name the run that does, or choose another run.dir "
            "to start anew"
        )
    if (same / storage.MANIFEST).is_file() and not _is(same, pin):
        return pin, f"{begun} and goes on from its own weights; {same} was made anew since, and is ignored"
    if steps[-1] > pin.step:
        ignored = storage.directory(run, steps[-1])
        return pin, f"{begun} and keeps to it; the newer {ignored} is ignored (another run.dir starts from that)"
    return pin, None


def _is(checkpoint: Path, pin: Pin) -> bool:
    manifest = checkpoint / storage.MANIFEST
    return manifest.is_file() and file_sha256(manifest) == pin.sha256


def _tokenizer(init: InitConfig, checkpoint: Path, manifest: dict[str, Any], new: bool) -> Path:
    """The tokenizer that the model was trained with, where `init` has it or where its run keeps it.

    Errors: ConfigError for another one, CheckpointError where there is none.
    """
    trained = manifest.get("identity", {}).get("tokenizer")
    if trained is None:
        raise CheckpointError(f"{checkpoint} does not say which tokenizer it was trained with; train it on a data plan")
    path = Path(init.tokenizer or "")
    file = path / MODEL_FILE if path.is_dir() else path
    if init.tokenizer is None or not (new or file.is_file()):  # a run that goes on has its own
        kept = tokenizer_of(checkpoint, manifest)
        assert kept is not None
        return kept
    if not file.is_file():
        raise ConfigError(
            f"init.tokenizer = {init.tokenizer!r}: {file} does not exist; leave the key out to take what the run keeps"
        )
    if (found := file_sha256(file)) != trained:
        raise ConfigError(
            f"init.tokenizer = {init.tokenizer!r} is not the tokenizer that {checkpoint} was trained with (its SHA-256 "
            f"is {found[:12]}..., that one's {trained[:12]}...); leave the key out to take what the run keeps"
        )
    return file


def _named(init: InitConfig) -> str:
    return f"init.checkpoint = {init.checkpoint!r}" if init.checkpoint else f"init.run = {init.run!r}"
