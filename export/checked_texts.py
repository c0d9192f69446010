"""The texts on which an exported model is checked: prompts of the config, and held-out passages of the plan."""

import random
from dataclasses import dataclass
from typing import Any

from configs.export import ExportConfig
from configs.loader import ConfigError
from export.heldout_passages import heldout_passages
from export.model_source import ModelSource
from pretrain.generation.text_codec import TextCodec

HELDOUT_PROMPT = 16  # tokens at the start of a held-out passage that serve as a prompt


@dataclass(frozen=True)
class Texts:
    """Texts, as token ids, on which the exported model is checked: `passages` for logits, `prompts` to continue.

    The passages are held-out text if `held_out`, else the prompts. Without a codec, which an imported model may lack,
    both are tokens drawn at random.
    """

    codec: TextCodec | None
    passages: list[list[int]]
    held_out: bool
    prompts: list[list[int]]


def read_texts(source: ModelSource, config: ExportConfig, console: Any) -> Texts:
    """Reads the prompts of the config and held-out passages of the data plan, and prints a note if there are none.

    Raises ConfigError if a continuation would be longer than the model's context, ValueError as `heldout_passages`.
    """
    if source.tokenizer is None and source.architecture is not None:
        return _drawn_texts(source, config, console)
    codec, options = source.codec(), config.verify
    if codec.chat_template is None:
        prompts = [codec.encode_prompt(text) for text in config.prompts]
    else:
        prompts = [codec.encode_chat(codec.chat.question(text)) for text in config.chat_prompts]
    passages: list[list[int]] = []
    most, tokenizer = min(options.max_tokens, source.context), source.need_tokenizer()
    if config.plan is not None:
        passages = heldout_passages(config.plan, options.rows, most, tokenizer)
    elif source.plan is not None:
        try:
            passages = heldout_passages(source.plan, options.rows, most, tokenizer)
        except ValueError as error:
            console.print(f"note: {error}", markup=False, soft_wrap=True)
    if not passages and source.lost_plan is not None:
        console.print(
            f"note: the plan that the model was trained on, {source.lost_plan}, is gone or has changed",
            markup=False,
            soft_wrap=True,
        )
    if not passages:
        console.print(
            "note: logits are compared on the prompts alone, not on held-out text; plan=FOLDER names a data plan",
            markup=False,
            soft_wrap=True,
        )
    opening = min(HELDOUT_PROMPT, source.context // 2)  # so that there is room to continue
    openings = [passage[:opening] for passage in passages[:: options.rows]]
    _check_lengths(source.context, prompts, openings, config)
    return Texts(codec, passages or prompts, bool(passages), prompts + openings)


def _drawn_texts(source: ModelSource, config: ExportConfig, console: Any) -> Texts:
    """Returns random tokens for an imported model whose tokenizer Trivium cannot use.

    Raises ConfigError as `read_texts`.
    """
    console.print(
        f"note: {source.path} has no tokenizer that Trivium can use; outputs are compared on random tokens, and the "
        "files of its tokenizer are copied as they are",
        markup=False,
        soft_wrap=True,
    )
    draw = random.Random(config.seed)
    room = source.context - config.verify.greedy_tokens
    lengths = [min(config.verify.max_tokens, source.context), max(1, min(HELDOUT_PROMPT, room))]
    passage, prompt = ([draw.randrange(source.model.vocab_size) for _ in range(length)] for length in lengths)
    _check_lengths(source.context, [prompt], [], config, sampled=False)
    return Texts(None, [passage], False, [prompt])


def _check_lengths(
    context: int, prompts: list[list[int]], openings: list[list[int]], config: ExportConfig, sampled: bool = True
) -> None:
    """Raises ConfigError if a prompt and its continuation are longer than the context that the folder will state.

    Without `sampled`, no continuations are sampled.
    """
    longest = max(map(len, prompts))
    if longest >= context:
        raise ConfigError(
            f"a prompt of {longest} tokens leaves no room in the {context} that the model was trained on at a time; "
            "shorten prompts, or chat_prompts of a model with a chat template"
        )
    wanted = {
        "verify.greedy_tokens": (config.verify.greedy_tokens, context - max(map(len, prompts + openings))),
    }
    if sampled:
        wanted["sample_tokens"] = (config.sample_tokens, context - longest)
    over = {key: room for key, (asked_for, room) in wanted.items() if asked_for > room}
    if over:
        said = " and ".join(f"{key} = {wanted[key][0]}" for key in over)
        raise ConfigError(
            f"{said} after the longest prompt would go past the {context} tokens that the model was trained on at a "
            f"time, which the folder will state; set {' '.join(f'{key}={room}' for key, room in over.items())}, or "
            "shorten the prompts"
        )
