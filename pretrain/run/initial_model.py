"""Initial model of a run that does not start from random weights: where it is, its config, tokenizer and lineage.

It is a checkpoint of another run, an imported model, or a Hugging Face folder, which is read as it is. A run never
changes what it started from: its own checkpoints record it, so that the run can continue even if the other run has
trained further or is gone. The trainer reads the weights, through `initial_weights`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from configs import presets
from configs.checkpoint_folders import OnlyInit, check_named
from configs.differences import words
from configs.files import file_sha256
from configs.initial import InitConfig
from configs.layout import CAPACITY_FACTOR, SEQ_LENGTH
from configs.loader import ConfigError, plain, validate
from configs.model import ModelConfig
from configs.reference import toml_value
from data_pipeline.mixture.rows import Plan
from data_pipeline.tokens.foreign import locate, roles_file, template_in
from data_pipeline.tokens.tokenizer import Tokenizer, difference_of_files, tokenizer_file
from pretrain.checkpoint import storage
from pretrain.checkpoint.lineage import Lineage, Pin, PlanLocation, plan_of, tokenizer_of
from pretrain.checkpoint.resume import model_changes
from pretrain.checkpoint.storage import CheckpointError
from pretrain.checkpoint.whole_model import WholeTensors, open_model, verify

Opened = TypeVar("Opened", bound="InitialModel")
# Keys of [model] in which a run may differ from the model that it starts from: the base of the rotary embedding for
# longer rows, the deviation of initial weights, which are not drawn, and modules of multi-token prediction, which may
# be left out, or be new.
_FREE = ("position.theta", "init_std", "head.mtp_depth", "head.mtp_weight")


@dataclass(frozen=True)
class InitialModel:
    """The model that a run starts from, with its config, tokenizer and lineage.

    `said` is the key that names it, for messages. `pin` identifies it. `tokenizer` is None if the model has none that
    Trivium can use. `note` is a remark for the user on what was chosen, or None. `own` is a checkpoint of the run
    itself if it continues, and `row` the length of its rows in tokens.
    """

    said: str
    pin: Pin
    model: ModelConfig
    tokenizer: Tokenizer | None
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

    def check_writes_text(self) -> None:
        """Raises ConfigError for a reward model, whose head gives values in place of logits."""
        if not self.model.has_logits:
            raise ConfigError(
                f"{self.said}: {self.own or self.pin.checkpoint} is a reward model, which writes no text; start "
                "from a language model, such as the one that it was trained from"
            )

    def check_model(self, model: ModelConfig) -> None:
        """Raises ConfigError if `model`, the config's, is another model; what only training uses may differ."""
        self.check_writes_text()
        found = model_changes(self.said, plain(self.model), plain(model), _FREE, starts=True)
        if found:
            remedy = " ".join(f"{key}={toml_value(before)}" for key, (before, _) in found.items() if before is not None)
            named = self.own or self.said
            raise ConfigError(
                f"[model] is not the model of {named}: {'; '.join(words(found))}; leave [model] out"
                + (f", or set {remedy}" if remedy else "")
            )

    def check_plan(self, location: str, plan: Plan, key: str = "data.plan") -> None:
        """Raises ConfigError if the data plan that `key` names was made with another tokenizer than the model's."""
        theirs = plan.tokenizer_path
        if self.tokenizer is None:
            raise ConfigError(
                f"{self.said}: nothing says which tokenizer the model was trained with; if it is the plan's, set "
                f"init.tokenizer={theirs.parent}"
            )
        if said := difference_of_files(theirs, self.tokenizer.origin, strict=True):
            raise ConfigError(
                f"{key} = {location!r} was made with the tokenizer {theirs}, and the model of {self.said} has "
                f"{self.tokenizer.origin}: {said}; set tokenizer.file={Path(self.tokenizer.origin).parent} in the data "
                "config, without other roles of its tokens, and run `trivium data run` again, or start from a model "
                "with that tokenizer"
            )

    @classmethod
    def open(cls: type[Opened], init: InitConfig, run_dir: str, resume: str) -> Opened:
        """Opens the initial model of the run in `run_dir`, new or continued with this --resume. Writes nothing.

        Raises ConfigError if there is no whole model, if its tokenizer is not the one it was trained with or has more
        tokens than the model, or if the run started from another model than `init` names.
        """
        own = _own_checkpoint(Path(run_dir), resume)
        if own is None:
            check_named(init)
        try:
            if own is None and init.hf is not None:
                found = _of_folder(cls, init, Path(init.hf))
            else:
                found = _of_checkpoint(cls, init, own, run_dir)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error) if own else f"{init.said}: {error}") from None
        if found.tokenizer is not None and found.tokenizer.vocab_size > found.model.vocab_size:
            raise ConfigError(
                f"{init.said}: {found.tokenizer.origin} has {found.tokenizer.vocab_size} tokens and the model "
                f"{found.model.vocab_size}; put the tokenizer that it was trained with there"
            )
        return found


@contextmanager
def initial_weights(pin: Pin) -> Iterator[WholeTensors]:
    """Context manager that opens the weights of the model that `pin` identifies, by their global names."""
    with open_model(Path(pin.checkpoint)) as tensors:
        yield tensors


def with_model(tree: dict[str, Any], resume: str) -> tuple[dict[str, Any], list[InitialModel]]:
    """Gives the tree of a config whose [init] names a model that model's keys in [model], below its own ones.

    Returns the tree and the model, none if other mistakes in the tree come first. Raises ConfigError as
    `InitialModel.open` does.
    """
    run, own = tree.get("run"), tree.get("model") or {}
    if not (isinstance(run, dict) and isinstance(run.get("dir"), str) and isinstance(own, dict)):
        return tree, []
    initial = InitialModel.open(validate(OnlyInit, {"init": tree["init"]}).init, run["dir"], resume)
    return {**tree, "model": presets.merged(plain(initial.model), own)}, [initial]


def _of_folder(cls: type[Opened], init: InitConfig, folder: Path) -> Opened:
    """Opens a Hugging Face folder as the initial model of a new run."""
    from export.hf_folder import content_sha256, facts_of, open_hf_folder, tokenizer_of_folder

    opened, tokenizer = open_hf_folder(folder, check=True), tokenizer_of_folder(folder)
    if init.tokenizer is not None:
        named = Tokenizer.load(_located(init.tokenizer), complete=False)
        if tokenizer is not None and (said := difference_of_files(named.origin, tokenizer.origin)):
            raise _other_tokenizer(init, str(folder), said)
        if tokenizer is None or tokenizer.eos_id < 0:
            tokenizer = named  # else it has the same tokens, and the model's own files say their roles
    pin = Pin(str(folder.resolve()), 0, content_sha256(folder))
    context = opened.family.longest_row(opened.raw)
    lineage = Lineage(None, template_in(folder), context, init=pin, imported=facts_of(folder, opened))
    return cls(init.said, pin, opened.model, tokenizer, _with_tokenizer(lineage, tokenizer))


def _with_tokenizer(lineage: Lineage, tokenizer: Tokenizer | None) -> Lineage:
    if tokenizer is None:
        return lineage
    roles = roles_file(tokenizer) if tokenizer.foreign else None
    return replace(lineage, tokenizer=Path(tokenizer.origin), roles=roles)


def _of_checkpoint(cls: type[Opened], init: InitConfig, own: Path | None, run_dir: str) -> Opened:
    """Opens the checkpoint that `init` names, or the run's own one and the model from which that began."""
    if own is None:
        checkpoint, note = _chosen(init)
        pin = Pin.of(checkpoint)
    else:
        checkpoint = own
        pin, note = _pinned(own, init, run_dir)
    manifest = storage.read_manifest(checkpoint)
    model = validate(ModelConfig, manifest["config"]["model"], origin=f"model of {checkpoint}")
    named = _named_tokenizer(init, checkpoint, manifest, new=own is None)
    lineage = replace(Lineage.of_checkpoint(checkpoint, manifest, named), init=pin)
    tokenizer = None
    if lineage.tokenizer is not None:
        tokenizer = Tokenizer.load(lineage.tokenizer, complete=False)
        if named is not None:
            lineage = _with_tokenizer(lineage, tokenizer)
    if (plan := plan_of(manifest)) is not None:
        path = plan.find(storage.run_of(checkpoint)) or Path(plan.path)
        lineage = replace(lineage, plan=PlanLocation.of(path, plan.fingerprint, Path(run_dir)))
    row = manifest.get("identity", {}).get("seq_length") if own else None
    return cls(init.said, pin, model, tokenizer, lineage, note, own, row)


def _named_tokenizer(init: InitConfig, checkpoint: Path, manifest: dict[str, Any], new: bool) -> Path | None:
    """Returns the file of the tokenizer that `init` names, None if the copy in the model's run is to be taken.

    Raises ConfigError if it is not the one that the model was trained with.
    """
    identity = manifest.get("identity", {})
    if init.tokenizer is None or (not new and not tokenizer_file(init.tokenizer).is_file()):
        return None  # a run that continues has a copy
    file = _located(init.tokenizer)
    if identity.get("tokenizer") is None:
        return file
    said, kept = "" if identity["tokenizer"] == file_sha256(file) else "the file is another one", None
    with suppress(CheckpointError):
        if (kept := tokenizer_of(checkpoint, manifest)) is not None:
            said = difference_of_files(file, kept)
    if said:
        raise _other_tokenizer(init, str(checkpoint), said)
    return None if kept is not None or identity.get("roles") else file


def _located(folder: str) -> Path:
    """Returns the file of the tokenizer that init.tokenizer names. Raises ConfigError if there is none."""
    try:
        return locate(folder, "init.tokenizer")
    except ConfigError as error:
        raise ConfigError(f"{error}; or leave the key out to take the model's own") from None


def _other_tokenizer(init: InitConfig, model: str, difference: str) -> ConfigError:
    """Returns the error for an init.tokenizer that is not the model's."""
    return ConfigError(
        f"init.tokenizer = {init.tokenizer!r} is not the tokenizer that {model} was trained with: {difference}; leave "
        "the key out to take the model's own"
    )


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


def _chosen(init: InitConfig) -> tuple[Path, str | None]:
    """Returns the checkpoint that `init` names, and a note for the user if a newer one is damaged.

    Raises ConfigError if it or what it was trained on top of is damaged.
    """
    path = Path(init.checkpoint or init.run or "")
    try:
        if init.checkpoint is None:
            warnings: list[str] = []
            newest = storage.latest(path, verify, warnings.append)
            return newest, "; ".join(warnings) or None
        verify(path)
    except CheckpointError as error:
        raise ConfigError(f"{init.said}: {error}") from None
    return path, None


def _pinned(own: Path, init: InitConfig, run_dir: str) -> tuple[Pin, str | None]:
    """Returns the initial checkpoint of the run that `own` belongs to, and a note if `init` now means another one.

    Raises ConfigError if `init` names a different model.
    """
    manifest, is_named = storage.read_manifest(own), storage.run_of(own) != Path(run_dir).resolve()
    anew = f"{'leave --resume out' if is_named else 'choose another run.dir'} to start a new one"
    if not manifest.get("init"):
        kind = "an imported model" if "config" not in manifest or "train" not in manifest["config"] else ""
        kind = kind or "a run that began from random weights"
        if is_named:
            raise ConfigError(
                f"--resume {own} is of {kind}, and this run begins from a model; leave --resume out, and to begin from "
                f"that one set {init.section}.checkpoint={own} in place of {init.named_by}"
            )
        raise ConfigError(f"run.dir = {run_dir!r} holds {own} of {kind}; choose another run.dir")
    pin = Pin(**manifest["init"])
    begun = f"{storage.run_of(own) if is_named else run_dir} began from {pin.checkpoint}"
    if init.checkpoint is not None:
        named = Path(init.checkpoint)
        if _is(named, pin):
            return replace(pin, checkpoint=str(named.resolve())), None  # both may have been moved
        if (named / storage.MANIFEST).is_file():
            raise ConfigError(
                f"{begun}, and init.checkpoint = {init.checkpoint!r} is another; name the first, or {anew}"
            )
        return pin, f"{begun} and continues from its own weights; init.checkpoint = {init.checkpoint!r} does not exist"
    if init.hf is not None:
        note = _pinned_folder(Path(init.hf), pin, begun, anew)
        return (pin if note else replace(pin, checkpoint=str(Path(init.hf).resolve()))), note
    assert init.run is not None
    run = Path(init.run)
    same, steps = storage.directory(run, pin.step), storage.steps(run)
    if not steps:
        return pin, f"{begun} and continues from its own weights; init.run = {init.run!r} has no checkpoint"
    if not _is(same, pin) and run.resolve() != pin.run and init.run != manifest["config"]["init"].get("run"):
        raise ConfigError(f"{begun}, which init.run = {init.run!r} does not hold; name the run that does, or {anew}")
    if _is(same, pin):
        pin = replace(pin, checkpoint=str(same.resolve()))
    elif (same / storage.MANIFEST).is_file():
        return pin, f"{begun} and continues from its own weights; {same} was written again since, and is ignored"
    if steps[-1] > pin.step:
        ignored = storage.directory(run, steps[-1])
        return pin, f"{begun} and keeps it; the newer {ignored} is ignored (another run.dir starts from that)"
    return pin, None


def _pinned_folder(folder: Path, pin: Pin, begun: str, anew: str) -> str | None:
    """Returns a note if the Hugging Face folder that a run began from is gone. Raises ConfigError for another one."""
    from export.hf_folder import content_sha256

    if not (folder / "config.json").is_file():
        return f"{begun} and continues from its own weights; init.hf = {str(folder)!r} does not exist"
    if str(folder.resolve()) == pin.checkpoint or content_sha256(folder) == pin.sha256:
        return None
    raise ConfigError(f"{begun}, and init.hf = {str(folder)!r} is another; name the first, or {anew}")


def _is(checkpoint: Path, pin: Pin) -> bool:
    """Whether `checkpoint` is the one that `pin` identifies, by its manifest's SHA-256."""
    manifest = checkpoint / storage.MANIFEST
    return manifest.is_file() and file_sha256(manifest) == pin.sha256
