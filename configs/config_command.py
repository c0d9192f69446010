"""`trivium config`: explains the keys of a config, or prints a config to start from, both made from the schemas."""

from collections.abc import Sequence

from configs.cli import SCHEMAS, command_parser, entrypoint
from configs.loader import ConfigError
from configs.reference import explain
from configs.starters import starter


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the reference or the config that the command line asks for and returns 0."""
    parser = command_parser(
        "trivium config",
        "Explains the keys of a config (type, default, meaning), or prints a config to start from.",
        "trivium config --explain pretrain optimizer.lr\n  trivium config --new pretrain > my.toml",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    names = ", ".join(SCHEMAS)
    which.add_argument("--explain", metavar="KIND", help=f"explain every key of this kind of config: {names}")
    which.add_argument("--new", metavar="KIND", help=f"print a small config that works, of this kind: {names}")
    parser.add_argument("key", metavar="KEY", nargs="?", default="", help="explain this key or section alone")
    args = parser.parse_args(argv)
    if args.new and args.key:
        raise ConfigError(f"--new prints a whole config, so leave out {args.key!r}")
    print(starter(args.new) if args.new else explain(args.explain, args.key))
    return 0


if __name__ == "__main__":
    entrypoint(main)
