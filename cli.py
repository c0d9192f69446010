"""The `trivium` command: a table of subcommands, each run by one function of one module.

Nothing is imported until a subcommand is called, so that `trivium --help` answers at once, also on a login node
without a GPU. The modules define their own options.
"""

import contextlib
import importlib
import sys
from collections.abc import Sequence

# command -> (module:function, its line in `trivium --help`)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("launch.recipe:demo", "every stage from raw text to verified Hugging Face models"),
    "recipe run": ("launch.recipe:main", "run the stages that a recipe lists, in order, each with its gates"),
    "config": ("configs.config_command:main", "explain the keys of a config, or print a config to begin with"),
    "data run": ("data_pipeline.command:main", "filter, deduplicate, tokenize and mix documents into training rows"),
    "data report": ("data_pipeline.report.ledger_tables:main", "show what was dropped at which stage, and why"),
    "data baselines": (
        "data_pipeline.report.baselines:main",
        "measure bits per byte of the held-out text under xz and a 5-gram model",
    ),
    "data verify": (
        "data_pipeline.provenance.verify:main",
        "check every file of a data run against its checksum",
    ),
    "data sample": (
        "data_pipeline.provenance.document_samples:main",
        "show random documents that a stage dropped, cut or kept",
    ),
    "data recall": ("data_pipeline.provenance.recall:main", "compare near-duplicate removal with brute force"),
    "data what-if": (
        "data_pipeline.provenance.what_if:main",
        "show what other thresholds would keep, from the stored scores",
    ),
    "data train-classifier": (
        "data_pipeline.scores.classifier:main",
        "train a quality classifier on good and bad texts",
    ),
    "data explain": ("data_pipeline.provenance.explain:main", "show what happened to one document, stage by stage"),
    "data trace": ("data_pipeline.provenance.trace:main", "list the documents in one training step's batch"),
    "data replan": ("data_pipeline.provenance.replan:main", "make other data plans for the rest of a training run"),
    "data takedown": ("data_pipeline.provenance.takedown:main", "find listed documents, and make a plan without them"),
    "tokenizer train": (
        "data_pipeline.tokens.train_command:main",
        "train a tokenizer on files, or on the documents of a data run",
    ),
    "tokenizer report": (
        "data_pipeline.tokens.report_command:main",
        "measure bytes per token of tokenizers on a data run's held-out text",
    ),
    "train": ("pretrain.train:main", "pretrain a dense or MoE decoder on a data plan"),
    "sft": ("posttrain.sft:main", "fine-tune on dialogues (SFT), with loss on answers only"),
    "rm": ("posttrain.rm:main", "train a reward model on pairs, judged reasoning steps or labelled texts"),
    "dpo": ("posttrain.dpo:main", "learn from preferences (DPO and kin: IPO, ORPO, SimPO, KTO)"),
    "ppo": ("posttrain.ppo:main", "reinforcement learning with a critic (PPO)"),
    "grpo": ("posttrain.grpo:main", "fine-tune by reinforcement learning from verifiable rewards"),
    "distill": ("posttrain.distill:main", "train a student on a teacher's next-token distributions"),
    "sample": ("posttrain.sample:main", "sample completions and keep the good ones as dialogues (rejection sampling)"),
    "rl compare": (
        "posttrain.algorithms.compare_dialects:main",
        "compare loss, gradient and clipping of a recorded batch under every dialect",
    ),
    "export": ("export.huggingface:main", "write a checkpoint as a Hugging Face directory, and verify it"),
    "import": ("export.import_hf:main", "convert a Hugging Face directory to Trivium's weights"),
    "eval": ("export.evaluate:main", "measure held-out perplexity, and run tasks of lm-evaluation-harness"),
    "generate": ("export.generate:main", "continue a prompt with a checkpoint"),
    "chat": ("export.chat:main", "talk to a fine-tuned checkpoint"),
    "prove": ("pretrain.proof.prove:main", "compare parallel layouts with one rank, tensor by tensor"),
    "replay": ("pretrain.replay:main", "take one step of a training run again, and show all that it computes"),
    "rehearse": ("posttrain.rehearse:main", "run one step of a large job's ranks on this machine"),
    "inspect": ("pretrain.inspection:main", "print a checkpoint's step, config, shapes and norms"),
    "doctor": ("pretrain.doctor.doctor:main", "look for what would end a run, or say why one has ended"),
    "drill": ("pretrain.drill.drill:main", "break small runs of a config on purpose, and see whether they recover"),
    "launch": ("launch.ranks:main", "start a command that trains or samples as several ranks on this machine"),
    "report": ("pretrain.report.run_report:main", "write a training run's report.html again"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and exits with its status; returns 0 after help or the version, 2 for a wrong command."""
    own = argv is None  # called for the process's own command line, not by a test
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
            _call(COMMANDS[name][0], argv[words:], own)  # exits
            return 0
    group = [name for name in COMMANDS if name.startswith(argv[0] + " ")]
    if group:
        if argv[1:2] in (["-h"], ["--help"]):
            _print(usage(group))
            return 0
        listed = ", ".join(name.split()[1] for name in group)
        hint = _nearest(" ".join(argv[:2]), group) if len(argv) > 1 else ""
        return _refuse(f"`trivium {argv[0]}` needs one of: {listed}{hint}")
    return _refuse(f"there is no command {argv[0]!r}; `trivium --help` lists them{_nearest(argv[0])}")


def usage(names: Sequence[str] = tuple(COMMANDS)) -> str:
    """Returns the help text, with one line for each command."""
    lines = [f"  trivium {name:<23}{COMMANDS[name][1]}" for name in names]
    return "\n".join(
        [
            "usage: trivium COMMAND CONFIG [key=value ...]",
            "",
            *lines,
            "",
            "`trivium COMMAND --help` has an example. Exit status: 0 done, 1 failed, 2 bad arguments or config,",
            "75 stopped by a signal with nothing lost (run it again), 130 interrupted.",
            "example: trivium launch --nproc-per-node 2 train configs/pretrain/demo.toml train.steps=50",
        ]
    )


def _call(target: str, argv: Sequence[str], own: bool) -> None:
    module, _, function = target.partition(":")
    from launch import bootstrap, environment

    if own:
        bootstrap.begin(module)
    from configs.cli import entrypoint

    prints_errors = module not in bootstrap.TRAINING.values() or environment.is_main()
    main_of_module = getattr(importlib.import_module(module), function)
    entrypoint(main_of_module, argv, prints_errors, environment.report_to_torchrun)


def _print(text: str) -> None:
    """Prints `text`, without an error if the reader has gone (`trivium --help | head -1`)."""
    from configs import signals

    with contextlib.suppress(BrokenPipeError):
        print(text)
    signals.flush()


def _refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def _nearest(said: str, names: Sequence[str] = tuple(COMMANDS)) -> str:
    """Returns the command that a misspelt one may have meant, by all of its words or the last, as a sentence's end."""
    import difflib

    spellings = {name.split()[-1]: name for name in names} | {name: name for name in names}
    close = difflib.get_close_matches(said.lower().replace("-", " "), spellings, n=1)
    return f"; did you mean {spellings[close[0]]!r}?" if close else ""


if __name__ == "__main__":
    sys.exit(main())
