"""The turns of episodes in recorded rollouts."""

from posttrain.chat.chat_format import ChatFormat
from posttrain.rl.rollout import Rollout


def turns_of(rollout: Rollout, i: int, chat: ChatFormat) -> list[tuple[bool, list[int]]]:
    """Returns the parts of sample i, each with whether the model wrote it, by the tokens that open and close turns."""
    length = int(rollout.lengths[i])
    whole = [*rollout.tokens[i][:length].tolist(), int(rollout.labels[i][length - 1])]
    parts: list[tuple[bool, list[int]]] = [(False, [])]
    for token in whole:
        parts[-1][1].append(token)
        if token == (chat.end_id if parts[-1][0] else chat.assistant_id):
            parts.append((not parts[-1][0], []))
    return [part for part in parts if part[1]]
