"""Scores dialogues with a trained reward model, in one process: rewards of RL, and of rejection sampling."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from configs.loader import ConfigError
from launch.environment import is_main
from posttrain.chat.format_interface import Chat
from posttrain.chat.messages import Message
from posttrain.initial_chat_model import InitialChatModel, NamedModel
from pretrain.checkpoint.adapter_base import content_of
from pretrain.checkpoint.lineage import Pin
from pretrain.model import Decoder
from pretrain.model.initial_weights import load_weights
from pretrain.run.initial_model import initial_weights

BATCH_TOKENS = 8192  # of a batch of dialogues, with padding

Dialogues = Sequence[Sequence[Message]]


class RewardModel:
    """A reward model in memory, with the chat format that it was trained on; `pin` identifies it."""

    def __init__(self, decoder: Decoder, chat: Chat, pin: Pin):
        self.decoder, self.chat, self.pin = decoder, chat, pin

    @classmethod
    def open(cls, path: str | Path, dtype: torch.dtype = torch.float32, key: str = "reward model") -> "RewardModel":
        """Opens a run's newest checkpoint, a checkpoint, or a Hugging Face folder; `key` named it, for messages.

        Raises ConfigError if there is none, or if it is a language model.
        """
        initial = InitialChatModel.open(
            NamedModel.at(Path(path), key), run_dir=f"{path}/none", resume="no", takes_values=True
        )
        if initial.note and is_main():
            print(f"note: {key} = {str(path)!r}: {initial.note}", flush=True)
        model = initial.model
        if model.has_logits:
            raise ConfigError(
                f"{key} = {str(path)!r} is a language model, which scores nothing; name a run of `trivium rm`"
            )
        decoder = Decoder(model)
        with initial_weights(initial.pin) as tensors:
            weights = {name: tensors.read(name) for name in tensors.shapes}
            # The load of experts, which has no part in what a model computes, is in checkpoints alone.
            load_weights(decoder, {**decoder.named_balance(), **tensors.balance, **weights})
        return cls(decoder.to(dtype).eval(), initial.chat, initial.pin)

    def scores(self, dialogues: Dialogues) -> list[float]:
        """Returns the reward of each dialogue: the value on its last token, or of two classes the second's log-odds.

        Raises BrokenDialogue if one is no dialogue, ValueError if the model has more than two classes.
        """
        outputs = self.decoder.model_config.head.outputs
        if outputs > 2:
            raise ValueError(f"the model has {outputs} classes, and a reward is one number; use `values`")
        tokens = [self.chat.render(dialogue)[0].tolist() for dialogue in dialogues]
        return [value[-1] - (value[0] if outputs == 2 else 0.0) for value in self.values(tokens)]

    def reads(self, dialogue: Sequence[Message]) -> bool:
        """Whether a dialogue can be written in the model's chat format; not with roles that it lacks, for example."""
        try:
            self.chat.render(dialogue)
        except ValueError:
            return False
        return True

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


class Scorer:
    """A function from dialogues to their rewards; `pin` identifies the reward model that gives them."""

    def __init__(self, model: RewardModel) -> None:
        self._model, self.pin = model, model.pin

    def __call__(self, dialogues: Dialogues) -> list[float]:
        """Returns the reward of each dialogue, NaN for one that the model cannot read."""
        readable = [i for i, dialogue in enumerate(dialogues) if self._model.reads(dialogue)]
        found = [math.nan] * len(dialogues)
        for i, score in zip(readable, self._model.scores([dialogues[i] for i in readable]), strict=True):
            found[i] = score
        return found


def open_scorer(path: str, key: str = "reward model") -> Scorer:
    """Opens the reward model at `path`. Raises ConfigError as `RewardModel.open` does, or for more than two classes."""
    model = RewardModel.open(path, key=key)
    if (outputs := model.decoder.model_config.head.outputs) > 2:
        raise ConfigError(
            f"{key} = {path!r} is a classifier of {outputs} classes, and a reward is one number; name a reward model "
            "that was trained on pairs, or one with two classes"
        )
    return Scorer(model)


def found_again(named: str, key: str, begun: Mapping[str, str]) -> str:
    """Returns where the reward model lies that a run began with, if config key `key` still names the same one.

    `begun` has the name in the config then, the checkpoint and its SHA-256. Raises ConfigError if it is not there.
    """
    if named != begun["model"]:
        return named
    checkpoint = Path(begun["checkpoint"])
    for path in (checkpoint, Path(named), Path(named, "checkpoints", checkpoint.name)):
        if content_of(path) == begun["sha256"]:
            return str(path)
    raise ConfigError(
        f"{key} = {named!r} was {checkpoint} when the run began, and that is gone or was replaced; restore it, or name "
        f"a checkpoint to go on with, such as {key}={named}/checkpoints/step_N"
    )
