"""Functions run in the ranks: gradients of distillation from one teacher, however the batch is divided and computed."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from safetensors.torch import save_file

from configs.distill import DistillSection
from configs.loader import validate
from configs.model import ModelConfig
from configs.train import ParallelConfig
from posttrain.distillation.distill_loss import DistillLoss
from posttrain.distillation.teacher import OpenedTeacher, Teacher, layout_of
from pretrain.checkpoint import storage
from pretrain.checkpoint.lineage import Lineage, Pin
from pretrain.data.batch_source import micro_batches
from pretrain.model import head_loss
from pretrain.parallel import groups, zero
from pretrain.run.initial_model import InitialModel
from tests.parallel.workers.layouts import GLOBAL_BATCH, make_engine, rows
from tests.parallel.workers.training import save_now


# The heads take a micro-batch in chunks of seven tokens, the last of which is short.
@mock.patch.multiple(head_loss, CHUNK_CPU=1, LEAST_TOKENS=7)
def gradients(
    model: dict[str, Any],
    teacher_model: dict[str, Any],
    teacher_run: str,
    parallel: dict[str, Any],
    out: str,
    micro: int,
    losses: list[str],
) -> dict[str, dict[str, float]]:
    """Writes the whole gradient of each parameter for each divergence, and returns the losses' means."""
    engine = make_engine(model, parallel)
    mesh, layout, train = engine.mesh, engine.mesh.layout, engine.train_config
    config, pin = validate(ModelConfig, teacher_model), Pin.of(storage.latest(Path(teacher_run)))
    own = layout_of(config, validate(ParallelConfig, parallel), train, layout.world_size)
    teacher = Teacher.read(OpenedTeacher(InitialModel("teacher", pin, config, None, Lineage()), own), train, mesh)
    share = GLOBAL_BATCH // layout.dp
    first = mesh.dp_rank * share
    batches = micro_batches(rows(first, share, engine.model_config.vocab_size), micro, first)
    teacher.see(batches)
    tensors, found = {}, {}
    for name in losses:
        section = validate(DistillSection, {"loss": name, "beta": 0.3, "temperature": 0.8})
        loss = DistillLoss(section, teacher, engine.model_config.vocab_size)
        sums = engine.evaluate(batches, loss)
        found[name] = {"loss": sums.mean_loss, **sums.metrics}
        engine.accumulate(batches, loss)
        for chunk in engine.module.chunks:
            for parameter, value in chunk.named_global_parameters():
                tensors[f"{name}/{parameter}"] = mesh.gather_whole(zero.full_gradient(value), value).clone()
    if dist.get_rank(mesh.zero_group) == 0 and mesh.tp_rank == 0:
        save_file(tensors, str(Path(out) / f"stage_{mesh.pp_rank}.safetensors"))
    groups.stop()
    return found


def save(model: dict[str, Any], run_dir: str) -> None:
    """Saves a model with random weights as a run."""
    engine = make_engine(model, {})
    save_now(engine, run_dir, step=1, facts={"config": {"model": model}})
    groups.stop()
