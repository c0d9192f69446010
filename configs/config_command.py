"""`trivium config`: every key of a config explained, or a config to begin with, printed from the schemas."""

from collections.abc import Sequence

from configs.cli import SCHEMAS, command_parser, entrypoint
from configs.loader import ConfigError
from configs.reference import explain
from configs.starters import starter


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "trivium config",
        "Explains the keys of a config, with type, default and what they mean; or prints a config to begin with.",
        "trivium config --explain pretrain optimizer.lr\n  trivium config --new pretrain > my.toml",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    names = ", ".join(SCHEMAS)
    which.add_argument("--explain", metavar="KIND", help=f"every key of one of: {names}")
    which.add_argument("--new", metavar="KIND", help=f"a small config that works, for one of: {names}")
    parser.add_argument("key", metavar="KEY", nargs="?", default="", help="explain this key or section alone")
    args = parser.parse_args(argv)
    if args.new and args.key:
        raise ConfigError(f"--new prints a whole config, so leave out {args.key!r}")
    print(starter(args.new) if args.new else explain(args.explain, args.key))
    return 0


if __name__ == "__main__":
    entrypoint(main)
