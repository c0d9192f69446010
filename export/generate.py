"""`trivium generate`: continues prompts with the model of a run or checkpoint, with Trivium's own decoder.

Runs in one process on the CPU, in fp32, with a key-value cache. It is no server.
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
    """Prints each --prompt with its continuation and returns 0."""
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
        note_if_cut(completion, room, args.max_new_tokens, context)
        if len(args.prompt) > 1:
            print("-" * 40)
    return 0


def beyond(tokens: int, context: int) -> str:
    """Part of a message for a text that fills the model's whole context."""
    return f"its {tokens} tokens fill the model's context of {context} tokens"


def note_if_cut(completion: "Completion", room: int, wanted: int, context: int) -> None:
    """Prints a note to stderr if a text was cut at the end of the model's context."""
    stopped = completion.stopped and len(completion.tokens) <= room
    if wanted > room and not stopped:
        said = f"stopped after {room} of {wanted} new tokens, at the end of the model's context of {context} tokens"
        print(f"note: {said}", file=sys.stderr, flush=True)


def load(source: str, step: str) -> tuple["Decoder", "TextCodec", int]:
    """Loads a model in fp32 on the CPU and returns (decoder, text codec, context length in tokens)."""
    from export.model_source import open_source
    from pretrain.model import build_single

    try:
        opened = open_source(source, step)
        codec = opened.codec()
        return build_single(opened.model, opened.read()), codec, opened.context
    except ValueError as error:  # a damaged checkpoint or another model's weights; the message names the file
        raise ConfigError(str(error)) from None


def command_line(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    """Returns a parser with the arguments that `trivium generate` and `trivium chat` share: the model and sampling."""
    parser = command_parser(
        prog=prog,
        description=description,
        example=example,
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help=RUN_HELP)
    parser.add_argument("--step", default="latest", help="step of the run's checkpoint (default: latest)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="maximum; the model's context may end sooner")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the most likely token")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens of this total share",
    )
    parser.add_argument("--seed", type=int, default=1234)
    return parser


def check_sampling(args: argparse.Namespace) -> None:
    """Raises ConfigError for sampling settings out of range."""
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens} is less than 1; give 1 or more")
    if args.temperature < 0:
        raise ConfigError(f"--temperature {args.temperature:g} is negative; give 0 (greedy) or more")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top-p {args.top_p:g} is not in (0, 1]; 1 samples from all tokens")


if __name__ == "__main__":
    entrypoint(main)
