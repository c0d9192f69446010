"""A model whose answers are written beforehand, for tests of episodes."""

from collections.abc import Mapping, Sequence

from posttrain.chat.chat_format import ChatFormat
from pretrain.generation.sampling import Completion


class Script:
    """Says the lines of each episode's script in turn; one that begins with "cut" has no end."""

    def __init__(self, chat: ChatFormat, scripts: Mapping[str, Sequence[str]]) -> None:
        self.chat, self.scripts = chat, scripts
        self.asked: list[tuple[str, list[int]]] = []

    def __call__(self, prompts: Sequence[list[int]], keys: Sequence[str]) -> list[Completion]:
        said = []
        for prompt, key in zip(prompts, keys, strict=True):
            self.asked.append((key, prompt))
            name, _, turn = key.partition("/turn")
            line = self.scripts[name][int(turn or 0)]
            tokens = self.chat.encode_text(line) + [self.chat.end_id] * (not line.startswith("cut"))
            said.append(Completion(tokens, [-0.5] * len(tokens), not line.startswith("cut")))
        return said
