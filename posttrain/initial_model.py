"""Initial model of a post-training run: that of any run, with the chat format that its dialogues are written in."""

from dataclasses import dataclass, replace
from functools import cached_property

from configs.initial import InitConfig
from configs.loader import ConfigError
from posttrain.chat.chat import Chat
from posttrain.chat.template_format import open_chat
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
        found = super().open(init, run_dir, resume)
        if not takes_values:
            found.check_writes_text()
        if found.tokenizer is None:
            raise ConfigError(
                f"{found.said}: nothing says which tokenizer the model was trained with; set init.tokenizer to its "
                "folder"
            )
        try:
            template = found.chat.template  # made here, so that its error is told with the rest
        except ValueError as error:
            raise ConfigError(str(error) if found.own else f"{found.said}: {error}") from None
        return replace(found, lineage=replace(found.lineage, chat_template=template))

    @cached_property
    def chat(self) -> Chat:
        """The model's chat format. Raises ValueError as `open_chat`."""
        assert self.tokenizer is not None
        return open_chat(self.tokenizer, self.lineage.chat_template)
