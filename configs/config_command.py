"""`trivium config`: explains the keys of a config, prints a config to start from, or lists the published models."""

from collections.abc import Sequence

from configs import presets
from configs.cli import command_parser, entrypoint
from configs.kinds import SCHEMAS
from configs.loader import ConfigError, load
from configs.reference import explain
from configs.starters import starter


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the reference or the config that the command line asks for and returns 0."""
    parser = command_parser(
        "trivium config",
        "Explains the keys of a config (type, default, meaning), prints a config to start from, or lists the published "
        "models that `model = NAME` takes.",
        "trivium config --explain pretrain optimizer.lr\n  trivium config --new pretrain > my.toml\n"
        "  trivium config --models",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    names = ", ".join(SCHEMAS)
    which.add_argument("--explain", metavar="KIND", help=f"explain every key of this kind of config: {names}")
    which.add_argument("--new", metavar="KIND", help=f"print a small config that works, of this kind: {names}")
    which.add_argument("--models", action="store_true", help="list the published models, with their parameters")
    parser.add_argument("key", metavar="KEY", nargs="?", default="", help="explain this key or section alone")
    args = parser.parse_args(argv)
    if args.new and args.key:
        raise ConfigError(f"--new prints a whole config, so leave out {args.key!r}")
    if args.models and args.key:
        raise ConfigError(f"--models lists all published models, so leave out {args.key!r}")
    if args.models:
        print(models())
    else:
        print(starter(args.new) if args.new else explain(args.explain, args.key))
    return 0


def models() -> str:
    """Returns a table of the published models: name, family, parameters, and those that one token uses.

    Modules of multi-token prediction are not counted, as where the models are published.
    """
    rows = [("name", "family", "parameters", "active")]
    for name in presets.names():
        preset = load(presets.Preset, presets.FOLDER / f"{name}.toml")
        model = preset.model.without_mtp()
        total, active = model.num_parameters(), model.num_parameters(active=True)
        rows.append((name, preset.family, f"{total:,}", f"{active:,}" if active != total else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{name:<{widths[0]}}  {family:<{widths[1]}}  {total:>{widths[2]}}  {active:>{widths[3]}}".rstrip()
        for name, family, total, active in rows
    )


if __name__ == "__main__":
    entrypoint(main)
