"""The `trivium` command: a table of subcommands, each run by one function of one module.

Thin on purpose: nothing is imported until a subcommand is called, so that `trivium --help` answers at once
and a login node without a GPU can ask for it. Leaves out every option: those belong to the modules.
"""

import contextlib
import importlib
import sys
from collections.abc import Sequence

# command -> (module:function, what it does, in one line)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("launch.demo:main", "raw text to verified Hugging Face models, every stage of it"),
    "config": ("configs.config_command:main", "every key of a config explained, or a config to begin with"),
    "data run": ("data_pipeline.run:main", "documents -> filtered, deduplicated, tokenized, planned"),
    "data report": ("data_pipeline.report.ledger_tables:main", "what was dropped at which stage, and why"),
    "data verify": (
        "data_pipeline.provenance.verify:main",
        "everything that a data run published against its checksums",
    ),
    "data sample": ("data_pipeline.provenance.sample:main", "random documents that a stage dropped, cut or kept"),
    "data recall": ("data_pipeline.provenance.recall:main", "near-duplicate removal of a run against brute force"),
    "data what-if": (
        "data_pipeline.provenance.what_if:main",
        "what other thresholds would keep, from the scores alone",
    ),
    "data train-classifier": ("data_pipeline.scores.classifier:main", "a quality classifier from good and bad texts"),
    "data explain": ("data_pipeline.provenance.explain:main", "what happened to one document, stage by stage"),
    "data trace": ("data_pipeline.provenance.trace:main", "the documents in one training step's batch"),
    "data replan": ("data_pipeline.provenance.replan:main", "other plans for the rest of a training run"),
    "data takedown": ("data_pipeline.provenance.takedown:main", "where listed documents are, and a plan without them"),
    "train": ("pretrain.train:main", "pretrain a dense or MoE decoder on a plan"),
    "sft": ("posttrain.sft:main", "supervised fine-tuning, loss on answers only"),
    "grpo": ("posttrain.grpo:main", "reinforcement learning from verifiable rewards"),
    "export": ("export.huggingface:main", "a checkpoint as a Hugging Face directory, reloaded and compared"),
    "import": ("export.import_hf:main", "a Hugging Face directory as a checkpoint"),
    "generate": ("export.generate:main", "continue a prompt with a checkpoint"),
    "chat": ("export.chat:main", "talk to a fine-tuned checkpoint"),
    "prove": ("pretrain.proof.prove:main", "parallel layouts against one rank, tensor by tensor"),
    "inspect": ("pretrain.checkpoint.inspection:main", "a checkpoint's step, config, shapes and norms"),
    "launch": ("launch.ranks:main", "run any of these as several ranks on this machine"),
    "report": ("pretrain.run_report:main", "draw a training run's report.html again"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns 0 done, 1 failed, 2 bad arguments or config.

    Exits where the module does.
    """
    own = argv is None  # the process's command line, and not one that a test calls
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        _print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        _print(f"trivium {version('trivium')}")
        return 0
    for words in (2, 1):
        name = " ".join(argv[:words])
        if len(argv) >= words and name in COMMANDS:
            _call(COMMANDS[name][0], argv[words:], own)  # ends the process with the module's exit status
            return 0
    group = [name for name in COMMANDS if name.startswith(argv[0] + " ")]
    if group:
        if argv[1:2] in (["-h"], ["--help"]):
            _print(usage(group))
            return 0
        return _refuse(f"`trivium {argv[0]}` needs one of: {', '.join(name.split()[1] for name in group)}")
    return _refuse(f"there is no command {argv[0]!r}; `trivium --help` lists them{_nearest(argv[0])}")


def usage(names: Sequence[str] = tuple(COMMANDS)) -> str:
    """The help text: one line a command."""
    lines = [f"  trivium {name:<23}{COMMANDS[name][1]}" for name in names]
    return "\n".join(
        [
            "usage: trivium COMMAND CONFIG [key=value ...]",
            "",
            *lines,
            "",
            "`trivium COMMAND --help` has an example. Exit status: 0 done, 1 failed, 2 bad arguments or config,",
            "75 stopped by SIGTERM or SIGUSR1 with nothing lost, 130 interrupted.",
            "example: trivium launch --nproc-per-node 2 train configs/pretrain/demo.toml train.steps=50",
        ]
    )


def _call(target: str, argv: Sequence[str], own: bool) -> None:
    module, _, function = target.partition(":")
    from launch import bootstrap, environment

    if own:
        bootstrap.begin(module)
    from configs.cli import entrypoint

    speaks = module not in bootstrap.TRAINING.values() or environment.is_main()
    entrypoint(getattr(importlib.import_module(module), function), argv, speaks, environment.tell_torchrun)


def _print(text: str) -> None:
    """Prints `text`, or as much of it as somebody reads (`trivium --help | head -1`)."""
    from configs import signals

    with contextlib.suppress(BrokenPipeError):
        print(text)
    signals.flush()


def _refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def _nearest(word: str) -> str:
    import difflib

    close = difflib.get_close_matches(word, {name.split()[0] for name in COMMANDS}, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


if __name__ == "__main__":
    sys.exit(main())
