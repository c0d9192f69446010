"""The set of dialogues that is made of a run's samples, and the record of what was kept and set aside.

Both are a function of the samples and of [keep]: written anew, they have the same bytes. The record is written last and
has the checksum of the dialogues.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.files import write_atomic
from configs.sample import SampleConfig
from posttrain.chat.format_interface import Chat, UntrainedEnd
from posttrain.chat.messages import BrokenDialogue, Message
from posttrain.rejection.keeping import NotKept, kept_of_prompt
from posttrain.rejection.prompts import Prompt, Prompts
from posttrain.rejection.samples import DrawnSample, SampleFiles

DIALOGUES, RECORD = "dialogues.jsonl", "sample.json"


@dataclass
class Counts:
    """Sums over all samples of a run; `solved` counts prompts by how many of their completions are kept."""

    samples: int = 0
    tokens: int = 0
    scored: int = 0
    score: float = 0.0
    best: float = 0.0
    kept: int = 0
    kept_tokens: int = 0
    prompts: int = 0
    solved: Counter[int] = field(default_factory=Counter)

    def add(self, samples: list[DrawnSample], kept: list[DrawnSample]) -> None:
        """Adds the samples of one prompt."""
        scores = [sample.score for sample in samples if sample.score is not None]
        self.prompts, self.samples = self.prompts + 1, self.samples + len(samples)
        self.tokens += sum(sample.tokens for sample in samples)
        self.scored, self.score = self.scored + len(scores), self.score + sum(scores)
        self.best += max(scores, default=0.0)
        self.kept, self.kept_tokens = self.kept + len(kept), self.kept_tokens + sum(one.tokens for one in kept)
        self.solved[len(kept)] += 1

    def measures(self, has_scores: bool) -> dict[str, float]:
        """Returns the values on which a recipe may have gates."""
        found = {
            "prompts": self.prompts,
            "samples": self.samples,
            "kept": self.kept,
            "kept_share": self.kept / max(1, self.samples),
            "prompts_kept": self.prompts - self.solved[0],
            "prompts_kept_share": (self.prompts - self.solved[0]) / max(1, self.prompts),
            "tokens_per_sample": self.tokens / max(1, self.samples),
            "tokens_per_kept": self.kept_tokens / max(1, self.kept),
        }
        if has_scores:
            found |= {"score": self.score / max(1, self.scored), "best_score": self.best / max(1, self.prompts)}
        return found


def publish(
    config: SampleConfig, files: SampleFiles, prompts: Prompts, chat: Chat, facts: dict[str, Any], context: int | None
) -> tuple[Counts, NotKept]:
    """Writes the dialogues and the record, and returns what is counted. Nothing is written if nothing is kept."""
    counts, set_aside, lines = Counts(), NotKept(), list[str]()
    scored = config.task.is_scored
    for prompt, samples in zip(prompts.items, files.by_prompt(), strict=True):
        kept = kept_of_prompt(samples, config.keep, scored, _Check(chat, prompt, context), set_aside)
        counts.add(samples, kept)
        lines += [json.dumps(_dialogue(prompt, sample, config, facts), ensure_ascii=False) + "\n" for sample in kept]
    if not lines:
        return counts, set_aside
    content = "".join(lines).encode("utf-8", "surrogatepass")
    record = {
        "dialogues": {"file": DIALOGUES, "sha256": hashlib.sha256(content).hexdigest(), "number": len(lines)},
        "drawn": facts,
        "keep": config.keep.model_dump(mode="json", exclude_none=True),
        "measures": counts.measures(scored),
        "kept_of_prompt": {str(number): count for number, count in sorted(counts.solved.items())},
        "repeated_prompts": prompts.repeated,
        "set_aside": {
            reason: {"number": count, "first": set_aside.first[reason]}
            for reason, count in sorted(set_aside.counts.items())
        },
    }
    folder = Path(config.run.dir)
    write_atomic(folder / DIALOGUES, content)
    write_atomic(folder / RECORD, json.dumps(record, indent=1).encode())
    return counts, set_aside


def _dialogue(prompt: Prompt, sample: DrawnSample, config: SampleConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Returns a record of the set, as `trivium sft` reads it."""
    return {
        "id": sample.name,
        "messages": [*_read(prompt), {"role": "assistant", "content": sample.text}],
        "score": sample.score,
        **({"rewards": dict(sample.rewards)} if sample.rewards else {}),
        "prompt_id": sample.problem,
        "sample": sample.number,
        "seed": config.run.seed,
        "model": facts["model"]["sha256"],
    }


def _read(prompt: Prompt) -> list[Message]:
    """Returns the messages of a prompt with all answers in it marked as read and not learnt."""
    return [{**one, "train": False} if one["role"] == "assistant" else one for one in prompt.problem.messages]


@dataclass(frozen=True)
class _Check:
    """The check that a completion can be learnt as a dialogue, in the chat format of the model that wrote it."""

    chat: Chat
    prompt: Prompt
    context: int | None

    def __call__(self, sample: DrawnSample) -> str | None:
        answer: Message = {"role": "assistant", "content": sample.text}
        try:
            tokens = self.chat.samples([*_read(self.prompt), answer])[-1].to_write().tokens
        except BrokenDialogue as broken:
            return f"no dialogue: {broken.rule}"
        except UntrainedEnd:
            return "no dialogue: the end of its turn would not be learnt"
        except ValueError:  # half a surrogate pair, say
            return "no dialogue: text that cannot be encoded"
        if self.context is not None and len(tokens) > self.context + 1:
            return "no dialogue: longer than the model's context"
        return None
