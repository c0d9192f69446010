"""Training and evaluation steps of the model over all ranks of a layout.

A training step has four parts: (1) count the trained tokens of the global batch, since every micro-batch's loss is
divided by that number; (2) run forward and backward of all micro-batches by megatron-core's pipeline schedule, and
during the last backward pass sum gradients over data parallel ranks; (3) sum the gradients of which several ranks hold
a part (see `gradients`); (4) clip gradients by the global norm and update the fp32 master weights. The sums of (2) and
(3) may be taken in either order. DeepSpeed, for ZeRO stages 2 and 3, averages gradients in place of summing them, so
for it the loss is multiplied by the number of averaged ranks first; its offloaded stage 1 averages only after (3).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from configs.adapters import AdapterConfig
from configs.model import ModelConfig
from configs.train import OptimizerConfig, TrainSection
from pretrain.megatron import ModelType, get_forward_backward_func, schedule_config
from pretrain.model import Decoder, LayerContext, init_weights, native
from pretrain.model.adapters import adapters_off, add_adapters
from pretrain.model.batch import Batch
from pretrain.model.compiling import compile_blocks
from pretrain.model.context import ForwardContext
from pretrain.model.head_loss import head_loss
from pretrain.model.losses import LossFunction, NextToken
from pretrain.model.moe.balance import LossDenominators
from pretrain.parallel import expert_balance, zero
from pretrain.parallel.context_parallel import exchange_around_attention, own_parts
from pretrain.parallel.details import PENALTY, StepDetails
from pretrain.parallel.distributed_optimizer import changes_weights
from pretrain.parallel.expert_parallel import spread_experts
from pretrain.parallel.frozen import freeze
from pretrain.parallel.gradients import mark_copies, sum_partial
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage, stage_specs
from pretrain.parallel.rank_budget import RankBudget
from pretrain.parallel.step_sums import StepSums

OPTIMIZER = "trivium optimizer"  # what the update of weights is called in traces


class Engine:
    """The model chunks of this rank with their optimizer: trains and evaluates on global batches."""

    def __init__(
        self,
        model_config: ModelConfig,
        train: TrainSection,
        optimizer: OptimizerConfig | None,
        mesh: Mesh,
        seed: int,
        dtype: torch.dtype,
        num_sources: int = 1,
        adapter: AdapterConfig | None = None,
        adapter_std: float = 0.0,
    ):
        """Builds the model and draws its weights.

        `adapter_std` is the standard deviation of those weights of adapters that begin at 0 in training, so that an
        adapter adds nothing at first. A proof draws them, since with zeros the gradients of others would be zero.
        Without an optimizer the model is frozen and only evaluates; its layout has ZeRO stage 1, and no memory is taken
        for training it.
        """
        self.mesh, self.model_config, self.train_config, self.adapter = mesh, model_config, train, adapter
        self._mtp_depth = model_config.head.mtp_depth
        self.num_sources = num_sources
        self._sound = torch.ones((), dtype=torch.bool, device=mesh.device)  # false once a step that ends the run failed
        self.busy_seconds = 0.0  # that this rank worked in the step before, which all ranks get with a step's results
        self.after_backward: Callable[[], None] | None = None  # called when the gradients of a step are whole
        self.micro_batches = 0  # forward passes that the step has begun on this rank, of all of its chunks
        # What names the base in checkpoints, where they leave frozen weights out: another one that has them.
        self.base: dict[str, Any] | None = None
        self.adapters_are_new = True  # False where the model that the run began from had them itself
        layout = mesh.layout
        context = LayerContext(
            dtype=dtype,
            device=mesh.device,
            sp=layout.sp,
            tp=mesh.tp_group,
            cp=mesh.cp_group,
            ep=mesh.ep_group,
            sequence_part=mesh.sequence_part,
            dropout=train.dropout,
            seed=seed,
            weights_come_by_call=layout.zero == 3,
        )
        building, drawing = zero.weights(mesh, dtype)
        with building:
            chunks = [Decoder(model_config, spec, context) for spec in stage_specs(layout, mesh.pp_rank)]
            if adapter is not None:
                adapter.check_model(model_config, train.seq_length)
                for chunk in chunks:
                    add_adapters(chunk, adapter, context, adapter_std)
        config = schedule_config(model_config, layout, dtype)
        for i, chunk in enumerate(chunks):
            init_weights(chunk, seed, mesh.slices, drawing)
            chunk.set_recompute(train.recompute)
            scheduled: Any = chunk  # the schedules read these attributes of the model
            scheduled.config, scheduled.model_type = config, ModelType.encoder_or_decoder
            scheduled.vp_stage = i
        # This order is required: weights are drawn first, and stage 3 splits each as soon as it is drawn. Tied copies
        # and experts are marked before ZeRO, which reads the marks when it groups parameters. The exchange is put
        # around attention before blocks are compiled, so that it is compiled too. ZeRO comes last: it moves all
        # parameters into the flat buffers of its optimizer.
        self.module = PipelineStage(chunks)
        freeze(self.module, train.freeze, mesh, adapter is not None)
        mark_copies(self.module, mesh)
        exchange_around_attention(self.module, mesh)
        spread_experts(self.module, mesh)
        if train.compile:
            if mesh.device.type == "cpu" and dtype == torch.bfloat16:
                native.load()
            compile_blocks(self.module.blocks.values())
        if optimizer is None:
            self.module.requires_grad_(False)
            self.zero: Any = None
            self._schedule = get_forward_backward_func(layout.pp, layout.vpp if layout.vpp > 1 else None)
            return
        self.zero = zero.wrap(self.module, train, optimizer, mesh, dtype)
        has_budget = adapter is not None and adapter.kind == "adalora"
        self.budget = RankBudget(self.module, self.zero, mesh, adapter) if adapter and has_budget else None
        self.details = StepDetails(self.module, mesh, self.zero, train.compile)
        self.loss_factor = zero.loss_factor(self.zero, mesh)
        self._schedule = get_forward_backward_func() if layout.zero == 1 else zero.schedule(self.zero)

    @property
    def separate_adapter(self) -> AdapterConfig | None:
        """The config of the adapters if they cannot be merged into the weights."""
        return None if self.adapter is None or self.adapter.merges else self.adapter

    def without_adapters(self) -> AbstractContextManager[None]:
        """Returns a context in which the engine evaluates the base of its adapters, with the same weights in place."""
        return adapters_off(self.module.chunks)

    def train_step(
        self,
        batches: Sequence[Batch],
        loss_fn: LossFunction,
        lr: float,
        largest_norm: float | None = None,
        detailed: bool = False,
        failure_ends: bool = True,
    ) -> StepSums:
        """Trains on this rank's micro-batches of one global batch, and returns without waiting for a GPU.

        Raises ValueError if no token of the global batch is trained on. If the gradient norm is not finite, no weight
        changes, and the results raise FloatingPointError once they are asked for. With a `largest_norm` they do not,
        and no weight changes where the norm is above it either. A `detailed` step takes the measures of `details`, too.
        If a norm that is not finite ends the run (`failure_ends`), later steps change no weight either, so that the
        failed step can be computed again.
        """
        if detailed:
            self.details.begin()
        self.accumulate(batches, loss_fn)
        return self.update(lr, largest_norm, detailed, failure_ends)

    def go_on_from_restored(self) -> None:
        """Lets steps change weights again, after the state of a checkpoint was restored."""
        self._sound.fill_(True)

    def accumulate(self, batches: Sequence[Batch], loss_fn: LossFunction) -> None:
        """Computes the global batch's gradients, averaged over data parallel and not yet clipped: parts 1 to 3."""
        mesh = self.mesh
        self.module.train()
        if self._mtp_depth:
            assert isinstance(loss_fn, NextToken), "only next-token losses train modules of multi-token prediction"
            batches = [batch.with_ahead(self._mtp_depth) for batch in batches]
        batches = self._parts(batches)
        weights = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()
        real = torch.stack([(batch.segments >= 0).sum() for batch in batches]).sum().double()
        # Batches are in host memory, and so gloo adds these numbers up, while a GPU is still at the step before.
        totals = torch.stack([weights, real])
        dist.all_reduce(totals, group=mesh.zero_group)
        weight, tokens = map(float, totals.numpy())
        if weight <= 0:
            raise ValueError("no token of the global batch is trained on (its loss mask is all zero); look at the data")
        num_sequences = sum(len(batch.tokens) for batch in batches) * mesh.layout.dp
        expert_balance.begin_step(self.module, LossDenominators(num_sequences, max(1, round(tokens)), self.loss_factor))
        zero.begin_step(self.zero, len(batches))
        self._sums = self._run(batches, loss_fn, self.loss_factor / weight, forward_only=False)
        zero.finish_backward(self.zero)
        sum_partial(self.module, mesh)
        zero.average_gradients(self.zero)
        if self.budget is not None:
            self._penalty = self.budget.add_penalty()
        if self.after_backward is not None:
            self.after_backward()

    def update(
        self, lr: float, largest_norm: float | None = None, detailed: bool = False, failure_ends: bool = True
    ) -> StepSums:
        """Clips the gradients and updates the weights with learning rate `lr`: part 4; see `train_step`."""
        most = torch.where(self._sound, math.inf if largest_norm is None else largest_norm, -math.inf)
        with record_function(OPTIMIZER):
            if self.budget is not None:
                self.budget.observe()
            grad_norm = zero.step(self.zero, lr, most)
        applied = changes_weights(grad_norm, most)
        if failure_ends:
            self._sound = applied
        if self.budget is not None:
            self.budget.finish_step(applied)
        expert_balance.finish_step(self.module, self.mesh, applied)
        experts = expert_balance.counts(self.module, self.mesh, self.model_config)
        details = self.details.finish(self.model_config) if detailed else {}
        if self.budget is not None:
            details[PENALTY] = self._penalty
        return self._sums.of_step(grad_norm, experts, None if largest_norm is None else applied, details)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], loss_fn: LossFunction) -> StepSums:
        """Computes losses of held-out micro-batches; every data-parallel rank passes the same number of its own."""
        self.module.eval()
        # The interleaved schedule needs a multiple of pp micro-batches: copies of weight zero fill the last group.
        missing = -len(batches) % self.mesh.layout.pp if self.mesh.layout.vpp > 1 else 0
        filled = [*batches, *[batches[0].weightless()] * missing]
        return self._run(self._parts(filled), loss_fn, 1.0, forward_only=True)

    def _parts(self, batches: Sequence[Batch]) -> list[Batch]:
        """Returns this rank's parts of whole rows."""
        if self.model_config.has_contexts:
            batches = [batch.with_contexts() for batch in batches]
        return own_parts(batches, self.mesh)

    def _run(self, batches: Sequence[Batch], loss_fn: LossFunction, scale: float, forward_only: bool) -> StepSums:
        chunks = self.module.chunks
        prepended = chunks[0].virtual.count if chunks[0].virtual.in_rows else 0
        on_device = [batch.to(self.mesh.device) for batch in batches]
        iterators = [iter(on_device) for _ in chunks]
        self.micro_batches = 0
        self._contexts: dict[int, ForwardContext] = {}  # by the identity of a batch that later chunks still have to see
        stored = self._schedule(
            forward_step_func=partial(self._forward_step, loss_fn=loss_fn, scale=scale),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1] * self.mesh.layout.cp + prepended,
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=forward_only,
        )
        metrics = (*loss_fn.metrics, *(f"mtp_loss_{i + 1}" for i in range(len(batches[0].ahead))))
        if self.mesh.counts_in_sums:
            sums = torch.stack(stored).sum(0)
        else:
            length = 2 * self.num_sources + len(metrics)
            sums = torch.zeros(length, dtype=torch.float64, device=self.mesh.device)
        if not forward_only:
            busy = torch.zeros(self.mesh.layout.world_size, dtype=torch.float64, device=self.mesh.device)
            busy[self.mesh.rank] = self.busy_seconds
            sums = torch.cat([sums, busy])
        return StepSums(self.mesh.sum_over_world(sums), self.num_sources, metrics)

    def _forward_step(
        self, batches: Iterator[Batch], model: Decoder, loss_fn: LossFunction, scale: float
    ) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        self.micro_batches += 1
        context = self._context(batch, model)
        of_modules = self.model_config.head.mtp_weight / max(1, self._mtp_depth)
        loss = head_loss(batch, loss_fn, scale, self.num_sources, of_modules)
        output = model(batch.tokens, batch.positions, batch.segments, wanted=batch.trained, context=context, loss=loss)

        def results(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            # Given three values the schedule does not divide the loss by the number of micro-batches; here it is
            # already divided by the token count of the global batch.
            return output, torch.zeros((), dtype=torch.int, device=output.device), loss.all_sums

        return output, results

    def _context(self, batch: Batch, model: Decoder) -> ForwardContext:
        """Returns the `ForwardContext` that all layers of this rank's chunks share for a micro-batch.

        The first chunk makes it, and the last one leaves it to autograd.
        """
        chunks = self.module.chunks
        context = self._contexts.pop(id(batch), None)
        if context is None:
            virtual = chunks[0].virtual  # with ZeRO 2 and 3 `model` is DeepSpeed's
            context = ForwardContext.of_batch(self.model_config, batch, virtual)
        if len(chunks) > 1 and model is not chunks[-1]:
            self._contexts[id(batch)] = context
        return context
