"""Initial model of a post-training run: that of any run, with the chat format that its dialogues are written in."""

from dataclasses import dataclass, replace
from functools import cached_property

from configs.initial import InitConfig
from configs.loader import ConfigError
from posttrain.chat.chat_format import ChatFormat, jinja_template
from pretrain import initial_model


@dataclass(frozen=True)
class InitialChatModel(initial_model.InitialModel):
    """The model that a post-training run starts from; `chat` is its chat format."""

    @classmethod
    def open(cls, init: InitConfig, run_dir: str, resume: str, takes_values: bool = False) -> "InitialChatModel":
        """Opens the initial model of the run in `run_dir`, as pretraining does, and its chat format.

        Raises ConfigError as pretraining does, if the model has no tokenizer, or none that the format can use, and if
        it is a reward model, unless the run `takes_values`.
        """
        found, template = super().open(init, run_dir, resume), jinja_template()
        if not takes_values:
            found.check_writes_text()
        if found.tokenizer is None:
            raise ConfigError(
                f"{found.said}: nothing says which tokenizer the model was trained with; set init.tokenizer to its "
                "folder"
            )
        if found.lineage.chat_template not in (None, template):
            raise ConfigError(
                f"{found.said}: {found.own or found.pin.checkpoint} was trained on another chat format than this "
                "version of Trivium has; use the version that trained it, or start from a pretraining run"
            )
        found = replace(found, lineage=replace(found.lineage, chat_template=template))
        try:
            found.chat  # made here, so that its error is told with the rest  # noqa: B018
        except ValueError as error:
            raise ConfigError(str(error) if found.own else f"{found.said}: {error}") from None
        return found

    @cached_property
    def chat(self) -> ChatFormat:
        """The chat format with the model's tokenizer. Raises ValueError if it lacks a control token."""
        assert self.tokenizer is not None
        return ChatFormat(self.tokenizer)
