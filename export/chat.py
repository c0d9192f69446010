"""`trivium chat`: a conversation on the terminal with a model trained on dialogues, by Trivium's own decoder."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.cli import entrypoint
from configs.loader import ConfigError
from export.generate import beyond, check_sampling, command_line, load, tell_if_cut

if TYPE_CHECKING:
    from export.chat_codec import TextCodec
    from pretrain.model import Decoder


def main(argv: Sequence[str] | None = None) -> int:
    """`trivium chat`: a conversation on the terminal. /reset starts over, /exit or end of input leaves."""
    parser = command_line(
        "trivium chat",
        "Talks with a model trained on dialogues. /reset starts over, /exit leaves.",
        "trivium chat runs/demo/sft --temperature 0.7",
    )
    parser.add_argument("--system", help="a system message to begin with")
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
            said = f"the dialogue, {beyond(len(prompt), context)}"
            print(f"{said}; /reset starts over, or say it in fewer words", file=sys.stderr, flush=True)
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
    """The model's next turn after a `prompt` within its context. `key` makes each turn draw anew from the one seed."""
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
    tell_if_cut(completion, room, args.max_new_tokens, context)
    return codec.decode(completion.tokens)


if __name__ == "__main__":
    entrypoint(main)
