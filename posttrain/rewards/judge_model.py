"""The reward of a trained reward model, which scores a batch of dialogues at once."""

from collections.abc import Callable, Mapping, Sequence

from posttrain.chat.messages import Message
from posttrain.rewards.attempt import Attempt, TaskScore

Scorer = Callable[[Sequence[list[Message]]], Sequence[float]]  # dialogues that end with the answer, to scores


class ModelReward:
    """Scores attempts by `scorer`, all of them in one call. A score that is no finite number is unscorable.

    `made_from` identifies the model.
    """

    compares, quick, answer_is_text = False, False, True

    def __init__(self, scorer: Scorer, made_from: Mapping[str, str]) -> None:
        self.scorer, self.made_from = scorer, made_from

    def check(self, key: str) -> None:
        """Does nothing: the model was opened when the reward was made."""

    def __call__(self, attempts: Sequence[Attempt]) -> list[TaskScore]:
        dialogues: list[list[Message]] = [
            [*attempt.problem.messages, {"role": "assistant", "content": attempt.completion}] for attempt in attempts
        ]
        return [TaskScore.of(float(score), "scored") for score in self.scorer(dialogues)] if dialogues else []
