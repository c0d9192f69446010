"""Initial model of a post-training run: a checkpoint, its model config, its tokenizer and the chat format.

A run never changes the checkpoint that it started from: its own checkpoints record it, so that the run can continue
even if the other run has trained further or is gone. The trainer reads the weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.files import file_sha256
from configs.initial import InitConfig
from configs.layout import CAPACITY_FACTOR, SEQ_LENGTH
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from data_pipeline.tokens.tokenizer import Tokenizer, tokenizer_file
from posttrain.chat.chat_format import ChatFormat, jinja_template
from pretrain.checkpoint import storage
from pretrain.checkpoint.lineage import Lineage, Pin, PlanLocation, plan_of, text_sha256, tokenizer_of
from pretrain.checkpoint.storage import CheckpointError


@dataclass(frozen=True)
class InitialModel:
    """The checkpoint that a post-training run starts from, with its config, chat format and lineage.

    `pin` identifies the checkpoint. `note` is a remark for the user on which one was chosen, or None. `own` is a
    checkpoint of the run itself if it continues, and `row` the length of its rows in tokens.
    """

    pin: Pin
    model: ModelConfig
    chat: ChatFormat
    lineage: Lineage
    note: str | None = None
    own: Path | None = None
    row: int | None = None

    @property
    def continues(self) -> bool:
        """Whether the run already has a checkpoint of its own."""
        return self.own is not None

    @property
    def given(self) -> tuple[str, ...]:
        """Config keys that the model or earlier steps have fixed, so messages do not suggest changing them."""
        return (CAPACITY_FACTOR, SEQ_LENGTH) if self.continues else (CAPACITY_FACTOR,)

    def check_rows(self, seq_length: int) -> None:
        """Raises ConfigError if a run that continues would get rows of another length than it began with."""
        if self.row not in (None, seq_length):
            raise ConfigError(
                f"train.seq_length = {seq_length}, and {self.own} was trained on rows of {self.row} tokens; set "
                f"train.seq_length={self.row}, or choose another run.dir"
            )

    @classmethod
    def open(cls, init: InitConfig, run_dir: str, resume: str) -> "InitialModel":
        """Opens the initial model of the run in `run_dir`, new or continued with this --resume. Writes nothing.

        Raises ConfigError if there is no complete checkpoint or no tokenizer, if they do not belong together, or if the
        run started from another model than `init` names.
        """
        own = _own_checkpoint(Path(run_dir), resume)
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
        lineage = Lineage(tokenizer, template, manifest.get("context", 0), plan, pin)
        row = manifest.get("identity", {}).get("seq_length") if own else None
        return cls(pin, model, chat, lineage, note, own, row)


def _own_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """Returns any readable checkpoint of a run that continues, None for a new run; all name the same initial model."""
    own = [storage.directory(run_dir, step) for step in reversed(storage.steps(run_dir))]
    for path in [*own, *([] if resume in ("auto", "no") else [Path(resume)])]:
        try:
            storage.read_manifest(path)
        except CheckpointError:
            continue  # the trainer reports what is wrong with it
        return path
    return None


def _chosen(init: InitConfig) -> Path:
    """Returns the checkpoint that `init` names. Raises ConfigError if it does not exist or is damaged."""
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
    """Returns the initial checkpoint of the run that `own` belongs to, and a note if `init` now means another one.

    Raises ConfigError if `init` names a different model.
    """
    manifest = storage.read_manifest(own)
    if not manifest.get("init"):
        raise ConfigError(f"run.dir = {run_dir!r} holds {own} of a pretraining run; choose another run.dir")
    pin = Pin(**manifest["init"])
    begun = f"{run_dir} began from {pin.checkpoint}"
    if init.checkpoint is not None:
        named = Path(init.checkpoint)
        if _is(named, pin):
            return pin, None
        if (named / storage.MANIFEST).is_file():
            raise ConfigError(
                f"{begun}, and init.checkpoint = {init.checkpoint!r} is another; name the first, or choose another "
                "run.dir to start a new one"
            )
        return pin, f"{begun} and continues from its own weights; init.checkpoint = {init.checkpoint!r} is gone"
    assert init.run is not None
    run = Path(init.run)
    same, steps = storage.directory(run, pin.step), storage.steps(run)
    if not steps:
        return pin, f"{begun} and continues from its own weights; init.run = {init.run!r} has no checkpoint any more"
    if not _is(same, pin) and run.resolve() != pin.run and init.run != manifest["config"]["init"].get("run"):
        raise ConfigError(
            f"{begun}, which init.run = {init.run!r} does not hold; name the run that does, or choose another run.dir "
            "to start a new one"
        )
    if (same / storage.MANIFEST).is_file() and not _is(same, pin):
        return pin, f"{begun} and continues from its own weights; {same} was written again since, and is ignored"
    if steps[-1] > pin.step:
        ignored = storage.directory(run, steps[-1])
        return pin, f"{begun} and keeps it; the newer {ignored} is ignored (another run.dir starts from that)"
    return pin, None


def _is(checkpoint: Path, pin: Pin) -> bool:
    """Whether `checkpoint` is the one that `pin` identifies, by its manifest's SHA-256."""
    manifest = checkpoint / storage.MANIFEST
    return manifest.is_file() and file_sha256(manifest) == pin.sha256


def _tokenizer(init: InitConfig, checkpoint: Path, manifest: dict[str, Any], new: bool) -> Path:
    """Path of the tokenizer that the model was trained with: `init.tokenizer`, or the copy in the model's run.

    Raises ConfigError if `init` names another tokenizer, CheckpointError if the model has none.
    """
    trained = manifest.get("identity", {}).get("tokenizer")
    if trained is None:
        raise CheckpointError(f"{checkpoint} does not say which tokenizer it was trained with; train it on a data plan")
    file = tokenizer_file(init.tokenizer or "")
    if init.tokenizer is None or not (new or file.is_file()):  # a run that continues has a copy
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
