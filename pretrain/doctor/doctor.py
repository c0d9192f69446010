"""`trivium doctor`: one line for each thing that may end a training run, with what to do about it.

trivium doctor configs/pretrain/demo.toml parallel.tp=2
trivium doctor runs/demo/pretrain
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.cli import command_parser, entrypoint
from configs.config_kind import command_for, kind_of_command
from configs.kinds import schema_of
from configs.loader import ConfigError, load
from configs.train import PretrainConfig, TrainerConfig
from launch.bootstrap import TRAINING
from pretrain.doctor.after_run import after_run
from pretrain.doctor.before_run import disk, dry_run, folder_fault, links, trial
from pretrain.doctor.findings import Finding, Severity, worst
from pretrain.doctor.machine import devices_here, machine
from pretrain.rehearsal.distinct_ranks import smallest_world

COMMANDS = tuple(name for name in TRAINING if name != "sample")  # which trains nothing
FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the findings and returns 1 if one of them would end the run, else 0."""
    args = _parser().parse_args(argv)
    if args.ranks is not None and args.ranks < 1:
        raise ConfigError(f"--ranks {args.ranks} is no number of ranks; give 1 or more")
    found = []
    for finding in _findings(args):
        print(finding, flush=True)
        found.append(finding)
    return FAILED if worst(found) is Severity.FAILURE else 0


def _findings(args: argparse.Namespace) -> Iterator[Finding]:
    words = args.words
    if len(words) == 1 and Path(words[0], "ledger.json").is_file():
        raise ConfigError(
            f"{words[0]} is a data run, and no training run; `trivium data verify {words[0]}` compares its files with "
            "their checksums"
        )
    if len(words) == 1 and Path(words[0], "config.toml").is_file():
        yield from after_run(Path(words[0]))
        return
    if words and words[0].endswith(".toml"):
        words = [command_for(words[0], words[1:], COMMANDS, "trains nothing"), *words]
    if words and (words[0] not in COMMANDS or len(words) == 1):
        raise ConfigError(
            f"{' '.join(words)!r} is neither the folder of a run nor a training command with its config; give one, "
            "such as runs/demo/pretrain, or train CONFIG"
        )
    ranks = args.ranks or (fewest_ranks(words[0], words[1:]) if words else 1)
    here = ranks if args.ranks or ranks <= devices_here() else 1  # of a large job, those of this machine are not known
    about_machine = list(machine(here))
    yield from about_machine
    fit = worst(about_machine) is not Severity.FAILURE
    if not words:
        if fit and here > 1:
            yield links(here, "auto")
        return
    command, words = words[0], words[1:]
    said = dry_run(command, words, ranks)
    refused = said.level is Severity.FAILURE
    try:
        config = _config(command, words)
    except ConfigError:
        if not refused:
            raise
        yield said
        return
    if refused and folder_fault(config):  # which the line on the disk tells; in another folder the dry run goes on
        with tempfile.TemporaryDirectory(prefix="trivium-doctor-") as other:
            said = dry_run(command, [*words, f"run.dir={other}/run"], ranks)
    yield said
    parameters = config.model.num_parameters() if isinstance(config, PretrainConfig) else None
    if fit and not refused and here > 1:
        yield links(here, config.parallel.backend)
    yield from disk(config, parameters)
    if args.trial and not refused:
        yield trial(command, words, ranks, config)


def fewest_ranks(command: str, words: Sequence[str]) -> int:
    """Returns the fewest ranks that the degrees of a config allow; 1 if the config is wrong."""
    try:
        return smallest_world(_config(command, words).parallel)
    except ConfigError:
        return 1


def _config(command: str, words: Sequence[str]) -> TrainerConfig:
    """Reads the config of a training command. Raises ConfigError if it is wrong."""

    def complete(tree: dict[str, Any]) -> dict[str, Any]:
        if command != "train" or not tree.get("init"):
            return tree
        from pretrain.run.initial_model import with_model

        return with_model(tree, "auto")[0]

    schema = schema_of(kind_of_command(command))
    assert issubclass(schema, TrainerConfig)
    return load(schema, words[0], words[1:], complete)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        prog="trivium doctor",
        description="Looks for what would end a training run before it begins, or says why a run has ended. Each line "
        "is ok, a warning or a failure, with what to do.",
        example="trivium doctor --ranks 2 --trial configs/pretrain/demo.toml parallel.tp=2\n"
        "of a run that has ended:\n  trivium doctor runs/demo/pretrain\nof this machine alone:\n  trivium doctor",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="ranks that the run is for (default: the fewest that its degrees of parallelism allow)",
    )
    parser.add_argument("--trial", action="store_true", help="also train two steps here, into a temporary folder")
    parser.add_argument(
        "words",
        metavar="WHAT",
        nargs=argparse.REMAINDER,
        help="[COMMAND] CONFIG [key=value ...], or the folder of a run",
    )
    return parser


if __name__ == "__main__":
    entrypoint(main)
