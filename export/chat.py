"""`trivium chat`: a conversation on the terminal with a model trained on dialogues, with Trivium's own decoder."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.cli import entrypoint
from configs.loader import ConfigError
from export.generate import beyond, check_sampling, command_line, load, note_if_cut

if TYPE_CHECKING:
    from export.chat_codec import TextCodec
    from pretrain.model import Decoder


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the conversation: /reset starts it over, /exit or the end of input ends it. Returns 0."""
    parser = command_line(
        "trivium chat",
        "Chats with a model trained on dialogues. /reset starts over, /exit ends.",
        "trivium chat runs/demo/sft --temperature 0.7",
    )
    parser.add_argument("--system", help="the system message")
    args = parser.parse_args(argv)
    check_sampling(args)
    decoder, codec, context = load(args.source, args.step)
    if codec.chat_template is None:
        raise ConfigError(f"{args.source} has no chat template; chat needs a run of `trivium sft` or later")

    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages, turn = list(opening), 0
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        if text == "/exit":
            return 0
        if text == "/reset":
            messages = list(opening)
            continue
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        prompt = codec.encode_chat(messages)
        if len(prompt) >= context:
            messages.pop()
            said = f"the dialogue is too long: {beyond(len(prompt), context)}"
            print(f"{said}; start over with /reset, or write a shorter message", file=sys.stderr, flush=True)
            continue
        reply = answer(decoder, codec, prompt, args, context, key=str(turn))
        messages.append({"role": "assistant", "content": reply})
        turn += 1
        print(reply, flush=True)


def answer(
    decoder: "Decoder",
    codec: "TextCodec",
    prompt: list[int],
    args: argparse.Namespace,
    context: int,
    key: str = "0",
) -> str:
    """Samples the model's answer to a `prompt` shorter than its context.

    `key` gives each turn random numbers of its own, all from the one seed.
    """
    from pretrain.sampling import generate

    room = context - len(prompt)
    completion = generate(
        decoder,
        [prompt],
        min(args.max_new_tokens, room),
        temperature=args.temperature,
        seed=args.seed,
        stop_ids=codec.stop_ids,
        top_p=args.top_p,
        keys=[key],
    )[0]
    note_if_cut(completion, room, args.max_new_tokens, context)
    return codec.decode(completion.tokens)


if __name__ == "__main__":
    entrypoint(main)
