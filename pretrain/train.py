"""`trivium train`: pretrains a decoder on a mixture plan, in any layout.

torchrun --nproc-per-node 2 -m pretrain.train configs/pretrain/demo.toml parallel.tp=2
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from launch import bootstrap

    bootstrap.begin("pretrain.train")

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.checkpoint_folders import check_start
from configs.cli import TRAINING_OPTIONS, TURN_SECONDS, entrypoint, parse_args, profiled_steps
from configs.folders import check_run_dir
from configs.layout import SEQ_LENGTH, Layout
from configs.loader import ConfigError
from configs.train import PretrainConfig
from data_pipeline.core.integrity import DamagedData, check_at_once
from data_pipeline.mixture.rows import Plan
from launch.environment import ClusterEnvironment, is_main, report_to_torchrun
from pretrain.run.plan_choice import PlanChoice, choose_plan

if TYPE_CHECKING:
    from pretrain.checkpoint.lineage import Lineage
    from pretrain.data.batch_source import PlanSource
    from pretrain.heldout_loss import HeldoutLoss
    from pretrain.parallel.groups import Mesh
    from pretrain.run.initial_model import InitialModel
    from pretrain.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `trivium train` on one rank and returns the exit status, see `Trainer.fit`."""
    begun: list[InitialModel] = []

    def complete(tree: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
        """Gives a config with [init] the keys of that model."""
        if not tree.get("init"):
            return tree
        check_start(tree, args.resume)
        from pretrain.run.initial_model import with_model  # imports torch

        tree, found = with_model(tree, args.resume)
        begun.extend(found)
        return tree

    config, args = parse_args(
        PretrainConfig,
        argv,
        prog="trivium train",
        description="Pretrains a decoder. Run again with the same command, it goes on from its newest checkpoint.",
        example="trivium train configs/pretrain/demo.toml train.steps=50 parallel.tp=1",
        options=TRAINING_OPTIONS,
        complete=complete,
    )
    initial = begun[0] if begun else None
    profiled = profiled_steps(args.profile, config.train.steps)
    if not config.model.has_logits:
        raise ConfigError(
            "model.head.kind = 'scalar' has no logits to pretrain; set model.head.kind=language_model, and train a "
            "reward model from the result with `trivium rm`"
        )
    env = ClusterEnvironment.read()
    layout = Layout.of(env.world_size, config.parallel, config.model, config.train, given=(SEQ_LENGTH,))
    check_run_dir(config.run.dir)
    try:
        choice = _choose_plan(config, args.resume, initial)
        unchecked = check_at_once(choice.plan.store_files()) if args.dry_run and env.is_main else ""
    except DamagedData as error:  # all ranks read the same plan and find the same damage
        return _failed(error, prints=env.is_main)
    if choice.reason and env.is_main:
        print(f"data.plan: {choice.reason}", flush=True)
    if initial and initial.note and env.is_main:
        print(f"note: {initial.note}", flush=True)
    if args.dry_run:
        from pretrain.run.dry_start import check_dry_start

        print(
            f"{config.model.num_parameters():,} parameters ({config.model.num_parameters(active=True):,} active), "
            f"layout {layout}, {layout.grad_accum_steps} micro-batches a step, {config.train.steps} steps of "
            f"{config.train.global_batch_size * config.train.seq_length:,} tokens"
            f"{f', from {initial.pin.checkpoint},' if initial else ''} into {config.run.dir}"
            + (f"\nnote: {unchecked}" if unchecked else "")
        )
        lineage = _lineage(choice.plan, config, initial)
        check_dry_start(config, config.model, _source(config, choice), lineage, args.resume, env.is_main)
        return 0

    # torch takes seconds to import, so mistakes in the config are reported before.
    from pretrain.data.data_check import DamagedTrainingData
    from pretrain.parallel import groups
    from pretrain.run.memory_use import lack_is_told

    with groups.joined(env, layout, config.parallel.backend) as mesh, lack_is_told(config, config.model, mesh):
        try:
            name, plan = config.run.name, choice.plan
            heldout = _heldout(plan, config.eval.rows, mesh)
            if heldout and mesh.is_main and (bare := [s for s in plan.sources if not plan.heldout_rows(s)]):
                print(
                    f"{name}: {plan.path} has no held-out documents of {', '.join(bare)}, so the held-out loss of "
                    "these sources is not measured",
                    flush=True,
                )
            return make_trainer(config, choice, initial, mesh, args.resume, heldout, profiled).fit()
        except DamagedTrainingData as error:  # the same on all ranks
            return _failed(error, prints=mesh.is_main)
        except DamagedData as error:  # found in a row, by the ranks that read that row alone
            return _failed(error, prints=mesh.counts_in_sums)


def make_trainer(
    config: PretrainConfig,
    choice: PlanChoice,
    initial: "InitialModel | None",
    mesh: "Mesh",
    resume: str,
    heldout: "Sequence[HeldoutLoss]" = (),
    profiled: range = range(0),
) -> "Trainer":
    """Returns the trainer of a pretraining run, on the plan that was chosen."""
    from pretrain.model.losses import NextToken
    from pretrain.trainer import Trainer

    return Trainer(
        config,
        config.model,
        _source(config, choice),
        NextToken(),
        mesh,
        heldout,
        _lineage(choice.plan, config, initial),
        config.run.name,
        resume=resume,
        profiled=profiled,
    )


def _source(config: PretrainConfig, choice: PlanChoice) -> "PlanSource":
    from pretrain.data.batch_source import PlanSource

    return PlanSource(choice.plan, choice.common_samples, config.run.seed if config.model.has_contexts else None)


def _failed(error: DamagedData, prints: bool) -> int:
    """Prints the error on the ranks with `prints`, lets the others wait until it is printed, and returns status 1."""
    if prints:
        print(f"error: {error}", file=sys.stderr)
    else:
        time.sleep(TURN_SECONDS)
    return 1


def _heldout(plan: Plan, rows: int, mesh: "Mesh") -> "list[HeldoutLoss]":
    """Returns the evaluator of the loss on `rows` held-out rows per source; an empty list if `rows` is 0.

    Raises DamagedTrainingData on all ranks together, with the damage that any of them found.
    """
    from pretrain.data.data_check import DamagedTrainingData
    from pretrain.heldout_loss import HeldoutLoss

    evaluators, found = [], ""
    try:
        if rows:
            evaluators.append(HeldoutLoss.of_plan(plan, rows))
    except DamagedData as error:
        found = str(error)
    if said := list(dict.fromkeys(filter(None, mesh.gather_json(found)))):
        raise DamagedTrainingData("; ".join(said))
    return evaluators


def _lineage(plan: Plan, config: PretrainConfig, initial: "InitialModel | None") -> "Lineage":
    """Returns the lineage of the run's model: the plan's, with what the initial model adds to it if there is one."""
    from pretrain.checkpoint.lineage import Lineage

    lineage = Lineage.of_plan(plan, config.run.dir)
    if initial is None:
        return lineage
    before = initial.lineage
    return replace(
        lineage,
        init=initial.pin,
        context=before.context,
        chat_template=before.chat_template,
        imported=before.imported,
    )


def _choose_plan(config: PretrainConfig, resume: str, initial: "InitialModel | None") -> PlanChoice:
    """Returns the plan to train on. Raises ConfigError if its rows or its tokenizer are not those of the model."""
    choice = choose_plan(config.data.plan, Path(config.run.dir), resume, config.checkpoint.mirror)
    expected = [("train.seq_length", config.train.seq_length, choice.plan.seq_length)]
    if initial is None:
        expected.append(("model.vocab_size", config.model.vocab_size, choice.plan.vocab_size))
    else:
        initial.check_plan(config.data.plan, choice.plan)
        initial.check_model(config.model)
    for key, configured, planned in expected:
        if configured != planned:
            raise ConfigError(
                f"{key} = {configured}, but the plan {choice.plan.path} was built for {planned}; set {key}={planned}"
            )
    return choice


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
