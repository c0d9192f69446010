"""Stand-ins for what AdaLoRA's budget of ranks asks other ranks and the device for, where a rank is rehearsed alone.

The rehearsed step is one after which ranks are chosen, so that it has every collective that a step of AdaLoRA can have.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

from configs.train import TrainerConfig
from pretrain.model.adapters import add_adapters
from pretrain.model.decoder import Decoder
from pretrain.model.layer_context import LayerContext
from pretrain.parallel import rank_budget, zero
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage, stage_specs


def choosing_ranks(config: TrainerConfig) -> TrainerConfig:
    """Returns the config; if it is one of AdaLoRA, with a budget that falls in the first step."""
    if config.adapter is None or config.adapter.kind != "adalora":
        return config
    falling = config.adapter.model_copy(update={"warmup_steps": 0, "budget_steps": 1, "prune_every": 1})
    return config.model_copy(update={"adapter": falling})


@contextlib.contextmanager
def stand_ins_of_budget(config: TrainerConfig) -> Iterator[None]:
    """Context manager in which engines with AdaLoRA are built and take their first step without values."""

    def names_of_all_stages(stage: PipelineStage, mesh: Mesh, tells: bool) -> list[str]:
        """Builds the other stages, since names depend on the types of their layers."""
        assert config.adapter is not None
        model, context = stage.chunks[0].model_config, LayerContext(device=mesh.device)
        chunks = []
        for number in range(mesh.layout.pp):
            for spec in stage_specs(mesh.layout, number):
                chunks.append(Decoder(model, spec, context))
                add_adapters(chunks[-1], config.adapter, context)
        return list(rank_budget.adapters_in(PipelineStage(chunks)))

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (rank_budget, "names_of_all_stages", names_of_all_stages),
            (rank_budget, "on_host", lambda number: 1),  # the step is applied, and it is the first
            (zero, "steps_done", lambda engine: 0),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
