"""`trivium data replan CONFIG --after CHECKPOINT --out FOLDER`: makes a new plan for the rest of a training run.

Use it after changing weights, packing, sequence length or number of samples in CONFIG (or by key=value). CHECKPOINT
records the plan that the run was trained on and how many of its samples are used. The new plan goes on from there: in
each epoch it contains exactly the tokens that the run has not used yet. To continue the training run, set data.plan to
the new plan. Existing files are not changed.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.checkpoint_folders import newest_manifest
from configs.cli import command_parser, entrypoint
from configs.data import DataConfig
from configs.files import new_folder
from configs.folders import check_writable
from configs.loader import ConfigError, load
from configs.mixture import PlanConfig
from configs.sealed import CHECKPOINT
from data_pipeline.core.console import say, wide_console
from data_pipeline.mixture.forecast import show
from data_pipeline.mixture.plan_files import build_stages
from data_pipeline.mixture.rows import Plan, open_plans
from data_pipeline.provenance.lookup import find_in, kept_plan_paths
from data_pipeline.tokens.tokenizer import difference_of_files, tokenizer_file


def used(checkpoint: Path, plan: Path | None = None) -> tuple[Plan, int]:
    """Returns (the plan that a checkpoint was trained on, number of its samples that are used).

    `plan` is the plan's present path, if it was moved. Raises ConfigError if there is no such checkpoint, or if it was
    trained on another plan.
    """
    path = checkpoint / "manifest.json"
    if not path.is_file():
        newest = newest_manifest(checkpoint)
        named = f"such as {newest.parent}" if newest else "e.g. RUN/checkpoints/step_N"
        raise ConfigError(f"--after {checkpoint}: there is no {path}; name a checkpoint, {named}")
    try:
        manifest = CHECKPOINT.read(path.read_bytes(), path)
    except ValueError as error:
        raise ConfigError(f"--after {checkpoint}: {error}; name an earlier checkpoint") from None
    where = plan or manifest["config"].get("data", {}).get("plan")
    if where is None:
        raise ConfigError(f"--after {checkpoint}: it was not trained on a plan, so there is none to go on from")
    try:
        paths = (plan,) if plan else (where, *kept_plan_paths(checkpoint.resolve().parent.parent))
        opened = find_in(map(str, paths), manifest["identity"]["data"])
    except ValueError as error:
        raise ConfigError(f"--after {checkpoint}: {error}; or say where its plan is by --plan") from None
    if opened is None:
        raise ConfigError(
            f"--after {checkpoint}: neither {where} nor a plan kept beside it is the one that it was trained on; name "
            "that by --plan"
        )
    return opened, manifest["samples"] - opened.first_sample


def rest(stages: Mapping[str, PlanConfig], samples: int) -> dict[str, PlanConfig]:
    """Returns the stages that are left once a run has used `samples` samples; raises ConfigError if none is."""
    left, end = {}, 0
    for name, stage in stages.items():
        begin, end = end, end + stage.samples
        if samples < end:
            left[name] = stage.model_copy(update={"samples": end - max(begin, samples)})
    if not left:
        key = f"mixture.stages.{name}.samples" if name else "mixture.samples"
        raise ConfigError(
            f"the checkpoint has used {samples:,} samples, and the mixture of CONFIG has {end:,} in all, the used ones "
            f"among them; raise {key} above {samples - end + stage.samples:,}"
        )
    return left


def check_tokenizer(folder: Path, plan: Plan, checkpoint: Path) -> None:
    """Raises ConfigError if a data run's tokenizer is not that of `plan`, on which `checkpoint` was trained."""
    if not tokenizer_file(folder).is_file():
        return  # which is told as of any plan
    own = plan.tokenizer_path
    if said := difference_of_files(folder, own, strict=True):
        raise ConfigError(
            f"{folder} is not the tokenizer of {plan.path}, on which {checkpoint} was trained: {said}; a run cannot go "
            f"on with other tokens, so name the data run of that plan, or set tokenizer.file={own.parent} and run "
            "`trivium data run` again"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "trivium data replan",
        "Makes a plan with other weights, packing or sequence length for the rest of a training run.",
        "trivium data replan configs/data/demo.toml mixture.weights.code=0.3 --after "
        "runs/demo/pretrain/checkpoints/step_120 --out runs/demo/more_code",
        DataConfig,
    )
    parser.add_argument("config", metavar="CONFIG", help="the TOML file of the data run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted overrides of the config's keys")
    parser.add_argument("--after", required=True, type=Path, help="the checkpoint from which the run is to go on")
    parser.add_argument("--out", required=True, type=Path, help="folder of the new plan; it must not exist")
    parser.add_argument("--plan", type=Path, help="where the checkpoint's plan is now, if not where its run found it")
    args = parser.parse_intermixed_args(argv)
    config = load(DataConfig, args.config, args.overrides)
    if args.out.exists():
        raise ConfigError(f"--out {args.out} exists already; name a new folder, nothing is overwritten")
    check_writable(args.out.parent, "--out", args.out)
    plan, samples = used(args.after, args.plan)
    stages = rest(config.plans(), plan.first_sample + samples)
    run_dir, console = Path(config.run.dir), wide_console()
    check_tokenizer(run_dir / "tokenizer", plan, args.after)
    try:
        with new_folder(args.out) as folder:
            build_stages(run_dir / "tokens", run_dir / "tokenizer", folder, stages, after=(plan, samples))
        made = open_plans(args.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, one in made.items():
        show(one.description, console, name)
    first = next(iter(made.values()))
    say(f"goes on after sample {first.first_sample:,} of the run: train with data.plan={first.path}", console)
    return 0


if __name__ == "__main__":
    entrypoint(main)
