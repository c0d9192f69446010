"""Scores dialogues with a trained reward model, in one process: rewards of RL, and of rejection sampling."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from configs.initial import InitConfig
from configs.loader import ConfigError
from posttrain.chat.chat import Chat
from posttrain.chat.messages import Message
from posttrain.initial_model import InitialChatModel
from pretrain.checkpoint import storage
from pretrain.initial_model import initial_weights
from pretrain.model import Decoder
from pretrain.model.weights import load_weights

BATCH_TOKENS = 8192  # of a batch of dialogues, with padding

Dialogues = Sequence[Sequence[Message]]


class RewardModel:
    """A reward model in memory, with the chat format that it was trained on."""

    def __init__(self, decoder: Decoder, chat: Chat):
        self.decoder, self.chat = decoder, chat

    @classmethod
    def open(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> "RewardModel":
        """Opens a run's newest checkpoint, a checkpoint, or a Hugging Face folder.

        Raises ConfigError if there is none, or if it is a language model.
        """
        initial = InitialChatModel.open(_init_of(Path(path)), run_dir=f"{path}/none", resume="no", takes_values=True)
        model = initial.model
        if model.has_logits:
            raise ConfigError(f"{path} is a language model, which scores nothing; name a run of `trivium rm`")
        decoder = Decoder(model)
        with initial_weights(initial.pin) as tensors:
            weights = {name: tensors.read(name) for name in tensors.shapes}
            # The load of experts, which has no part in what a model computes, is in checkpoints alone.
            load_weights(decoder, {**decoder.named_balance(), **tensors.balance, **weights})
        return cls(decoder.to(dtype).eval(), initial.chat)

    def scores(self, dialogues: Dialogues) -> list[float]:
        """Returns the reward of each dialogue: the value on its last token, or of two classes the second's log-odds.

        Raises BrokenDialogue if one is no dialogue, ValueError if the model has more than two classes.
        """
        outputs = self.decoder.model_config.head.outputs
        if outputs > 2:
            raise ValueError(f"the model has {outputs} classes, and a reward is one number; use `values`")
        tokens = [self.chat.render(dialogue)[0].tolist() for dialogue in dialogues]
        return [value[-1] - (value[0] if outputs == 2 else 0.0) for value in self.values(tokens)]

    @torch.inference_mode()
    def values(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Returns the K values on the last token of each row of token ids."""
        found: list[list[float]] = [[] for _ in rows]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            count = max(1, BATCH_TOKENS // len(rows[order[-1]]))
            taken, order = order[-count:], order[:-count]
            for i, values in zip(taken, self._batch([rows[i] for i in taken]), strict=True):
                found[i] = values
        return found

    def _batch(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        length = max(map(len, rows))
        tokens_BS = torch.zeros(len(rows), length, dtype=torch.int64)
        segments_BS = torch.full_like(tokens_BS, -1)
        for i, row in enumerate(rows):
            tokens_BS[i, : len(row)] = torch.tensor(row)
            segments_BS[i, : len(row)] = 0
        positions_BS = torch.arange(length).expand_as(tokens_BS)
        ends = torch.tensor([i * length + len(row) - 1 for i, row in enumerate(rows)])
        return self.decoder(tokens_BS, positions_BS, segments_BS, wanted=ends).tolist()


def open_scorer(path: str) -> Callable[[Dialogues], list[float]]:
    """Opens the reward model at `path`, and returns a function from dialogues to their rewards."""
    return RewardModel.open(path).scores


def _init_of(path: Path) -> InitConfig:
    """Returns the [init] section that names the model at `path`."""
    if (path / storage.MANIFEST).is_file():
        return InitConfig(checkpoint=str(path))
    return InitConfig(hf=str(path)) if (path / "config.json").is_file() else InitConfig(run=str(path))
