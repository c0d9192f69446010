"""The command-line options that `trivium generate` and `trivium chat` share: the model, sampling, and ends of texts."""

import argparse
from dataclasses import fields

from configs.cli import command_parser
from configs.loader import ConfigError
from configs.sampling import SamplingConfig, check

RUN_HELP = "a run directory (its newest checkpoint), a checkpoint, or an imported model"


def command_line(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    """Returns a parser with the shared options; `sampling_of` checks them."""
    parser = command_parser(prog=prog, description=description, example=example)
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help=RUN_HELP)
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="parallel.tp=2 splits the model over 2 ranks that torchrun or `trivium launch` has started; also "
        "parallel.ep and parallel.backend",
    )
    parser.add_argument("--step", default="latest", help="step of the run's checkpoint (default: latest)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of weights (default: fp32)")
    ends = parser.add_argument_group("end of a text, which also the model's context ends")
    ends.add_argument("--max-new-tokens", type=int, default=128, help="most tokens of a text (default: 128)")
    ends.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given many times"
    )
    group = parser.add_argument_group("sampling, in the order in which the options are applied")
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="make tokens of the prompt and text so far less likely; above 1 (default: 1, off)",
    )
    group.add_argument(
        "--temperature", type=float, default=0.8, help="0 always takes the likeliest token (default: 0.8)"
    )
    group.add_argument("--top-k", type=int, default=0, help="keep so many likeliest tokens (default: 0, all)")
    group.add_argument(
        "--top-p", type=float, default=1.0, help="keep the likeliest tokens of this total share (default: 1, all)"
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="keep tokens of at least this share of the likeliest one's probability (default: 0, all)",
    )
    group.add_argument("--seed", type=int, default=1234, help="fixes each prompt's text (default: 1234)")
    return parser


def sampling_of(args: argparse.Namespace) -> SamplingConfig:
    """Returns the sampling options, before torch is imported. Raises ConfigError for a value out of range."""
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens} is less than 1; give 1 or more")
    if not all(args.stop):
        raise ConfigError("--stop '' is found everywhere; give a text, or leave it out")
    given = {field.name: getattr(args, field.name) for field in fields(SamplingConfig)}
    for name, value in given.items():
        check(name, value, "--" + name.replace("_", "-"))
    return SamplingConfig(**given)
