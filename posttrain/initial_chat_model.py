"""The model that a post-training run begins from, with the chat format that its dialogues are written in."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from configs.initial import InitConfig
from configs.loader import ConfigError
from data_pipeline.tokens.foreign import template_in
from posttrain.chat.format_interface import Chat
from posttrain.chat.template_format import open_chat
from pretrain.checkpoint import storage
from pretrain.run import initial_model


@dataclass(frozen=True)
class InitialChatModel(initial_model.InitialModel):
    """The model that a post-training run starts from; `chat` is its chat format."""

    @classmethod
    def open(
        cls,
        init: InitConfig,
        run_dir: str,
        resume: str,
        takes_values: bool = False,
        template: str | None = None,
        keeps_modules: bool = False,
    ) -> "InitialChatModel":
        """Opens the initial model of the run in `run_dir`, as pretraining does, and its chat format.

        `template` is a file with a chat template that takes the place of the model's. Modules of multi-token prediction
        are left out unless the run `keeps_modules`, because it trains them by next-token losses. Raises ConfigError as
        pretraining does, if the model has no tokenizer, or none that the format can use, and if it is a reward model,
        unless the run `takes_values`.
        """
        found = super().open(init, run_dir, resume)
        if found.model.head.mtp_depth and not keeps_modules:
            said = "its modules of multi-token prediction are left out; pretraining and SFT without adapters train them"
            note = f"{found.note}; {said}" if found.note else f"{found.said}: {said}"
            found = replace(found, model=found.model.without_mtp(), note=note)
        if not takes_values:
            found.check_writes_text()
        if found.tokenizer is None:
            remedy = "set init.tokenizer to its folder"
            if isinstance(init, NamedModel):
                remedy = "name a run, which keeps its tokenizer"
            raise ConfigError(f"{found.said}: nothing says which tokenizer the model was trained with; {remedy}")
        if template is not None:
            found = replace(found, lineage=replace(found.lineage, chat_template=_read_template(template)))
        try:
            found.chat.check()  # made here, so that its error is told with the rest
            written = found.chat.template
        except ValueError as error:
            where = found.said if template is None else f"data.chat_template = {template!r}"
            raise ConfigError(str(error) if found.own else f"{where}: {error}") from None
        if template is None and found.own is None:
            _check_template_beside(init, written)
        return replace(found, lineage=replace(found.lineage, chat_template=written))

    @cached_property
    def chat(self) -> Chat:
        """The model's chat format. Raises ValueError as `open_chat`."""
        assert self.tokenizer is not None
        return open_chat(self.tokenizer, self.lineage.chat_template)


class NamedModel(InitConfig):
    """A model that another config key than those of [init] names, such as a reward model or a critic."""

    key: str
    """The key that names it, for messages."""

    @classmethod
    def at(cls, path: Path, key: str) -> "NamedModel":
        """Returns the model at `path`: a checkpoint, a Hugging Face folder, or a run, whose newest checkpoint it is."""
        kind = "hf" if (path / "config.json").is_file() else "run"
        return cls(key=key, **{"checkpoint" if (path / storage.MANIFEST).is_file() else kind: str(path)})

    @property
    def named_by(self) -> str:
        return self.key


def _check_template_beside(init: InitConfig, used: str) -> None:
    """Raises ConfigError if the tokenizer that `init` names has another chat template than the one that is used."""
    if init.tokenizer is None:
        return
    folder = Path(init.tokenizer) if Path(init.tokenizer).is_dir() else Path(init.tokenizer).parent
    if template_in(folder) not in (None, used):
        raise ConfigError(
            f"init.tokenizer = {init.tokenizer!r} has another chat template than the model of {init.said}, whose own "
            "is used; leave the key out (data.chat_template of SFT and distillation names another template)"
        )


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template = {path!r} cannot be read ({error}); name a Jinja template's file, or leave it out"
        ) from None
