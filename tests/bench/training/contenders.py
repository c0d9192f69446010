"""Work of one rank of a contender: builds its model, then takes one optimizer step per request.

A step includes forward and backward pass, clipping by the global norm and fused AdamW. Data loading and the trainer's
log are measured for no contender.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from configs.layout import Layout
from configs.loader import validate
from configs.train import OptimizerConfig, ParallelConfig, Precision, TrainSection
from launch.environment import ClusterEnvironment
from pretrain.data.batch_source import micro_batches, share_of_rank
from pretrain.parallel.engine import OPTIMIZER
from tests.bench.training import litgpt_peer, models
from tests.bench.training.models import SIZES

Step = Callable[[int], float]  # takes a step on rows of so many documents and returns the loss before it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Contender:
    """A model in one process or, with more ranks, several."""

    who: str  # trivium, transformers, plain, litgpt or products
    size: str
    precision: str = "fp32"
    compiled: bool = False
    ranks: int = 1
    autocast: bool = False  # a peer's weights, gradients and moments stay in fp32, as Trivium's always do

    @property
    def label(self) -> str:
        how = ["compiled" if self.compiled else "eager"] if self.who != "products" else []
        how += ["autocast"] if self.autocast else []
        how += [f"{self.ranks} ranks"] if self.ranks > 1 else []
        return f"{self.who} {', '.join(how)}".strip()

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def build(contender: Contender) -> contextlib.AbstractContextManager[Step]:
    """Returns a context that gives the contender's step, in the process group of this rank."""
    builders = {
        "trivium": _trivium,
        "transformers": _transformers,
        "plain": _plain,
        "litgpt": _litgpt,
        "products": _products,
    }
    return builders[contender.who](contender)


@contextlib.contextmanager
def _trivium(contender: Contender) -> Iterator[Step]:
    from pretrain.model.losses import NextToken
    from pretrain.parallel import groups
    from pretrain.parallel.engine import Engine

    size, env = SIZES[contender.size], ClusterEnvironment.read()
    train = TrainSection(
        steps=1,
        global_batch_size=size.rows,
        micro_batch_size=size.rows // contender.ranks,
        seq_length=size.length,
        compile=contender.compiled,
        precision=Precision(contender.precision),
    )
    optimizer = OptimizerConfig(
        lr=models.LR, betas=models.BETAS, eps=models.EPS, weight_decay=models.WEIGHT_DECAY, clip_grad=models.CLIP
    )
    layout = Layout.of(contender.ranks, validate(ParallelConfig, {}), size.config, train)
    with groups.joined(env, layout) as mesh:
        engine = Engine(size.config, train, optimizer, mesh, models.SEED, DTYPES[contender.precision])
        share = share_of_rank(0, size.rows, mesh.dp_rank, mesh.layout.dp)

        def step(documents: int) -> float:
            rows = models.rows(size, documents)[share.start : share.stop]
            batches = micro_batches(rows, train.micro_batch_size, share.start)
            return engine.train_step(batches, NextToken(), models.LR).mean_loss

        yield step


@contextlib.contextmanager
def _joined(contender: Contender) -> Iterator[None]:
    if contender.ranks == 1:
        yield
        return
    dist.init_process_group("gloo", init_method="env://")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _tensors(contender: Contender, documents: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns this rank's tokens, labels and positions."""
    rank = dist.get_rank() if contender.ranks > 1 else 0
    rows = models.rows(SIZES[contender.size], documents)
    share = share_of_rank(0, len(rows), rank, contender.ranks)
    (batch,) = micro_batches(rows[share.start : share.stop], len(share))
    labels = batch.labels.masked_fill(batch.loss_mask == 0, models.NO_LABEL)
    return batch.tokens, labels, batch.positions


def _peer_step(
    contender: Contender, model: torch.nn.Module, loss_of: Callable[[torch.nn.Module, int], torch.Tensor]
) -> Step:
    """Returns a step as one writes it for a model of PyTorch.

    In bf16 the weights, gradients and moments are in bf16, as the fastest peers have them, or with `autocast` in fp32.
    """
    model = model.to(torch.float32 if contender.autocast else DTYPES[contender.precision]).train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": models.WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=models.LR, betas=models.BETAS, eps=models.EPS, fused=True)
    called: Any = DistributedDataParallel(model) if contender.ranks > 1 else model
    called = torch.compile(called) if contender.compiled else called

    def step(documents: int) -> float:
        with torch.autocast("cpu", DTYPES[contender.precision], enabled=contender.autocast):
            loss = loss_of(called, documents)
        loss.backward()
        with record_function(OPTIMIZER):
            torch.nn.utils.clip_grad_norm_(model.parameters(), models.CLIP)
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    return step


@contextlib.contextmanager
def _transformers(contender: Contender) -> Iterator[Step]:
    def loss_of(model: torch.nn.Module, documents: int) -> torch.Tensor:
        tokens, labels, positions = _tensors(contender, documents)
        # transformers tells packed documents apart by positions that begin again.
        packed = {"position_ids": positions} if documents > 1 else {}
        return model(tokens, labels=tokens, shift_labels=labels, use_cache=False, **packed).loss

    with _joined(contender):
        size = SIZES[contender.size]
        yield _peer_step(contender, models.transformers_model(size.config, size.length), loss_of)


@contextlib.contextmanager
def _plain(contender: Contender) -> Iterator[Step]:
    def loss_of(model: torch.nn.Module, documents: int) -> torch.Tensor:
        tokens, labels, positions = _tensors(contender, documents)
        mask = None
        if documents > 1:
            document = (positions == 0).cumsum(1)
            mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]
        return model(tokens, labels, positions, mask)

    with _joined(contender):
        yield _peer_step(contender, models.Plain.build(SIZES[contender.size].config), loss_of)


@contextlib.contextmanager
def _litgpt(contender: Contender) -> Iterator[Step]:
    def loss_of(model: torch.nn.Module, documents: int) -> torch.Tensor:
        if documents > 1:
            raise ValueError("litgpt has no packed rows: give it rows of one document")
        tokens, labels, _ = _tensors(contender, documents)
        return litgpt_peer.loss_of(model, tokens, labels)

    with _joined(contender):
        size = SIZES[contender.size]
        yield _peer_step(contender, litgpt_peer.model_of(size.config, size.length), loss_of)


@contextlib.contextmanager
def _products(contender: Contender) -> Iterator[Step]:
    """Gives a step of nothing but the model's products of weights, which bounds what a trainer can reach.

    For every weight there is one product of the forward pass, and in the backward pass one for its gradient and one
    for its input's. A mixture's experts are computed as if each had its fair share of the tokens.
    """
    size, config = SIZES[contender.size], SIZES[contender.size].config
    tokens, hidden, dtype = size.rows * size.length, config.hidden_size, DTYPES[contender.precision]
    kv = config.num_kv_heads * config.dim_per_head
    layer = [(tokens, hidden, hidden)] * 2 + [(tokens, hidden, kv)] * 2
    experts, rows = (config.moe.num_experts, config.moe.top_k) if config.moe else (1, 1)
    ffn, of_expert = config.expert_size, tokens * rows // experts
    layer += ([(of_expert, hidden, ffn)] * 2 + [(of_expert, ffn, hidden)]) * experts
    shapes = layer * config.num_layers + [(tokens, hidden, config.vocab_size)]
    matrices = {
        shape: (torch.randn(shape[0], shape[1], dtype=dtype), torch.randn(shape[2], shape[1], dtype=dtype))
        for shape in set(shapes)
    }
    outputs = {shape: torch.randn(shape[0], shape[2], dtype=dtype) for shape in set(shapes)}

    def step(documents: int) -> float:
        for shape in shapes:
            x, weight = matrices[shape]
            torch.nn.functional.linear(x, weight)
            outputs[shape] @ weight
            outputs[shape].t() @ x
        return float("nan")

    yield step
