"""What a post-training run starts from: a checkpoint, the shape of its model, and its tokenizer's chat format."""

from dataclasses import dataclass
from pathlib import Path

from configs.loader import ConfigError, validate, write_atomic
from configs.posttrain import InitConfig
from configs.train import ModelConfig
from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.chat import ChatFormat, jinja_template
from pretrain.checkpoint import storage


@dataclass(frozen=True)
class Start:
    checkpoint: Path
    model: ModelConfig
    chat: ChatFormat

    @classmethod
    def open(cls, init: InitConfig) -> "Start":
        """Errors: ConfigError if there is no whole checkpoint or no tokenizer, or the two do not go together."""
        try:
            checkpoint = storage.latest(init.run)
            manifest = storage.read_manifest(checkpoint)
        except ValueError as error:
            raise ConfigError(f"init.run = {init.run!r}: {error}") from None
        model = validate(ModelConfig, manifest["config"]["model"], origin=f"model of {checkpoint}")
        try:
            chat = ChatFormat(Tokenizer.load(init.tokenizer))
        except ValueError as error:
            raise ConfigError(f"init.tokenizer = {init.tokenizer!r}: {error}") from None
        if chat.tokenizer.vocab_size != model.vocab_size:
            raise ConfigError(
                f"init.tokenizer = {init.tokenizer!r} has {chat.tokenizer.vocab_size} tokens and the model in "
                f"{checkpoint} {model.vocab_size}; name the tokenizer that the model was trained with"
            )
        return cls(checkpoint, model, chat)

    def write_template(self, run_dir: str) -> None:
        """Puts the chat format beside the run's checkpoints, for export and chat to find."""
        write_atomic(Path(run_dir) / "chat_template.jinja", jinja_template().encode())
