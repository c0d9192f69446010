"""`trivium generate`: continues prompts with a run or checkpoint, by Trivium's own decoder.

Runs on one CPU rank in fp32 with a key-value cache. Leaves out serving and batching across users.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.cli import command_parser, entrypoint
from configs.loader import ConfigError

if TYPE_CHECKING:
    from export.chat_codec import TextCodec
    from pretrain.model import Decoder
    from pretrain.sampling import Completion

RUN_HELP = "a run directory (its newest checkpoint), a checkpoint, or an imported model"


def main(argv: Sequence[str] | None = None) -> int:
    """`trivium generate`: continues each --prompt and prints prompt and continuation."""
    parser = command_line(
        "trivium generate",
        "Continues prompts with a trained model.",
        'trivium generate runs/demo/pretrain --prompt "Call me" --max-new-tokens 64 --temperature 0.8',
    )
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be given many times")
    args = parser.parse_args(argv)
    check_sampling(args)

    from pretrain.sampling import generate

    decoder, codec, context = load(args.source, args.step)
    prompts = [codec.encode_prompt(text) for text in args.prompt]
    rooms = [context - len(prompt) for prompt in prompts]
    for text, prompt in zip(args.prompt, prompts, strict=True):
        if len(prompt) >= context:
            raise ConfigError(f"--prompt {text[:20]!r}...: {beyond(len(prompt), context)}; give a shorter one")
    completions = generate(
        decoder,
        prompts,
        min(args.max_new_tokens, max(rooms)),
        temperature=args.temperature,
        seed=args.seed,
        stop_ids=codec.stop_ids,
        top_p=args.top_p,
        pad_id=codec.pad_id,
    )
    for text, completion, room in zip(args.prompt, completions, rooms, strict=True):
        print(text + codec.decode(completion.tokens[:room]), flush=True)
        tell_if_cut(completion, room, args.max_new_tokens, context)
        if len(args.prompt) > 1:
            print("-" * 40)
    return 0


def beyond(tokens: int, context: int) -> str:
    """The words for a text that fills the whole context, so that nothing can follow it."""
    return f"its {tokens} tokens leave no room in the {context} that the model was made for"


def tell_if_cut(completion: "Completion", room: int, wanted: int, context: int) -> None:
    """Says where a text ends because the model was not made for longer ones."""
    stopped = completion.stopped and len(completion.tokens) <= room
    if wanted > room and not stopped:
        said = f"stopped after {room} of {wanted} new tokens, at the {context} in all that the model was made for"
        print(f"note: {said}", file=sys.stderr, flush=True)


def load(source: str, step: str) -> tuple["Decoder", "TextCodec", int]:
    """The whole model in fp32 on the CPU, its text codec, and how many tokens it was made for at a time."""
    from export.model_source import open_source
    from pretrain.model import build_single

    try:
        opened = open_source(source, step)
        codec = opened.codec()
        return build_single(opened.model, opened.read()), codec, opened.context
    except ValueError as error:  # a damaged checkpoint, another model's weights: the message names the file
        raise ConfigError(str(error)) from None


def command_line(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser of the arguments that `trivium generate` and `trivium chat` share: the model, and how it is sampled."""
    parser = command_parser(
        prog=prog,
        description=description,
        example=example,
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help=RUN_HELP)
    parser.add_argument("--step", default="latest", help='which step of a run, default "latest"')
    parser.add_argument("--max-new-tokens", type=int, default=128, help="fewer where the model's context ends")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample within this share of the probability")
    parser.add_argument("--seed", type=int, default=1234)
    return parser


def check_sampling(args: argparse.Namespace) -> None:
    """Refuses sampling settings that cannot be, with a ConfigError."""
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens} is less than one")
    if args.temperature < 0:
        raise ConfigError(f"--temperature {args.temperature:g} is negative; 0 is greedy")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top-p {args.top_p:g} is not in (0, 1]")


if __name__ == "__main__":
    entrypoint(main)
