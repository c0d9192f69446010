"""Tests of megatron-core in two ranks, run in the ranks: a function for each item in pretrain/megatron.py."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from configs.layout import Layout
from configs.model import ModelConfig
from pretrain import megatron
from pretrain.megatron import parallel_state

OUT, IN, SEQUENCE, BATCH = 12, 8, 4, 3
MODEL = ModelConfig(vocab_size=32, num_layers=4, hidden_size=IN, ffn_hidden_size=8, num_heads=2, num_kv_heads=2)
KEPT = {"init_method": lambda weight: weight, "bias": False}


def column_layer() -> None:
    start(tp=2)
    for sequence_parallel in (False, True):
        config = layer_config(tp=2, sequence_parallel=sequence_parallel)
        layer = megatron.ColumnParallelLinear(
            IN, OUT, config=config, gather_output=False, disable_grad_reduce=True, tp_group=tp_group(), **KEPT
        )
        layer.sequence_parallel = False
        assert layer.weight.shape == (OUT // 2, IN) and (layer.output_size, layer.output_size_per_partition) == (12, 6)
        part = filled(layer.weight, drawn(OUT, IN).chunk(2)[rank()])
        x = drawn(SEQUENCE, BATCH, IN).requires_grad_()
        y, bias = layer(x)
        close(y, F.linear(x.detach(), part))
        assert bias is None
        gradient = drawn(*y.shape, seed=rank())
        y.backward(gradient)
        close(x.grad, gradient @ part)
        close(layer.weight.grad, gradient.flatten(0, 1).T @ x.detach().flatten(0, 1))


def row_layer() -> None:
    start(tp=2)
    for sequence_parallel in (False, True):
        config = layer_config(tp=2, sequence_parallel=sequence_parallel)
        layer = megatron.RowParallelLinear(
            OUT, IN, config=config, input_is_parallel=True, skip_bias_add=False, tp_group=tp_group(), **KEPT
        )
        assert layer.weight.shape == (IN, OUT // 2) and (layer.input_size, layer.input_size_per_partition) == (12, 6)
        whole, inputs = drawn(IN, OUT), drawn(SEQUENCE, BATCH, OUT, seed=1)
        part = filled(layer.weight, whole.chunk(2, 1)[rank()])
        x = inputs.chunk(2, 2)[rank()].clone().requires_grad_()
        y, bias = layer(x)
        expected = F.linear(inputs, whole)
        close(y, expected.chunk(2)[rank()] if sequence_parallel else expected)
        assert bias is None
        gradient = drawn(*expected.shape, seed=2)
        y.backward(gradient.chunk(2)[rank()] if sequence_parallel else gradient)
        close(x.grad, gradient @ part)


def embedding() -> None:
    start(tp=2)
    whole, tokens_BS = drawn(OUT, IN), torch.randint(0, OUT, (BATCH, SEQUENCE), generator=torch.Generator())
    for scattered in (False, True):
        layer = megatron.VocabParallelEmbedding(
            OUT,
            IN,
            init_method=KEPT["init_method"],
            reduce_scatter_embeddings=scattered,
            config=layer_config(tp=2, sequence_parallel=scattered),
            tp_group=tp_group(),
        )
        assert layer.weight.shape == (OUT // 2, IN) and layer.num_embeddings_per_partition == OUT // 2
        assert layer.reduce_scatter_embeddings is scattered
        filled(layer.weight, whole.chunk(2)[rank()])
        expected_BSH = F.embedding(tokens_BS, whole)
        close(layer(tokens_BS), expected_BSH.transpose(0, 1).chunk(2)[rank()] if scattered else expected_BSH)


def regions() -> None:
    start(tp=2)
    group, whole = tp_group(), drawn(SEQUENCE, BATCH, IN)
    mine, shares = drawn(SEQUENCE, BATCH, IN, seed=rank()), whole.chunk(2)
    both = drawn(SEQUENCE, BATCH, IN, seed=0) + drawn(SEQUENCE, BATCH, IN, seed=1)
    own = both.chunk(2)[rank()]
    cases: list[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
    cases = [  # function, its input, its output, a gradient by the output, the gradient by the input
        (lambda x: megatron.copy_to_tensor_model_parallel_region(x, group), whole, whole, mine, both),
        (lambda x: megatron.reduce_from_tensor_model_parallel_region(x, group), mine, both, whole, whole),
        (lambda x: megatron.gather_from_sequence_parallel_region(x, True, group), shares[rank()], whole, mine, own),
        (
            lambda x: megatron.gather_from_sequence_parallel_region(x, False, group),
            shares[rank()],
            whole,
            whole,
            shares[rank()],
        ),
        (
            lambda x: megatron.reduce_scatter_to_sequence_parallel_region(x, group),
            mine,
            own,
            shares[rank()],
            whole,
        ),
    ]
    for region, goes_in, comes_out, gradient, comes_back in cases:
        x = goes_in.clone().requires_grad_()
        y = region(x)
        close(y, comes_out)
        y.backward(gradient.clone())
        close(x.grad, comes_back)


def exchange() -> None:
    start()
    sent = ([1, 2], [3, 0])[rank()]  # rows to rank 0, to rank 1
    received = ([1, 3], [2, 0])[rank()]
    rows = (torch.arange(3.0)[:, None] + 10 * rank()).requires_grad_()
    arrived = megatron.all_to_all(dist.group.WORLD, rows, received, sent)
    assert arrived[:, 0].tolist() == ([0, 10, 11, 12], [1, 2])[rank()]
    arrived.backward(arrived.detach() + 100)
    close(rows.grad, rows.detach() + 100)


def process_groups() -> None:
    alone, both = [rank()], [0, 1]
    for degrees in ({"tp": 2}, {"cp": 2}, {"pp": 2}, {"ep": 2}, {}):
        start(**degrees)
        split = {name: size > 1 for name, size in ({"tp": 1, "cp": 1, "pp": 1, "ep": 1} | degrees).items()}
        data_parallel = not (split["tp"] or split["cp"] or split["pp"])
        state = parallel_state
        found = {
            "tp": (state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_group()),
            "cp": (state.get_context_parallel_rank(), state.get_context_parallel_group()),
            "pp": (state.get_pipeline_model_parallel_rank(), state.get_pipeline_model_parallel_group()),
            "ep": (state.get_expert_model_parallel_rank(), state.get_expert_model_parallel_group()),
        }
        for name, (index, group) in found.items():
            assert (index, members(group)) == ((rank(), both) if split[name] else (0, alone)), name
        assert state.get_data_parallel_rank() == (rank() if data_parallel else 0)
        zero = state.get_data_parallel_group(with_context_parallel=True)
        assert members(zero) == (both if data_parallel or split["cp"] else alone)
        same_experts = members(state.get_expert_data_parallel_group())
        assert same_experts == (both if members(zero) == both and not split["ep"] else alone)
        model = members(state.get_model_parallel_group())
        assert model == (both if split["tp"] or split["pp"] else alone)
        if split["pp"]:
            assert members(state.get_embedding_group()) == both
        state.destroy_model_parallel()
        assert not state.model_parallel_is_initialized()


def schedule_without_pipeline() -> None:
    start()
    chunk = Chunk(0, 0, layout())
    returned = schedule([chunk], layout(), num_microbatches=3)
    assert [value.tolist() for value in returned] == [[0.0], [1.0], [2.0]]
    assert chunk.received == [None] * 3
    close(chunk.weight.grad, sum(inputs(i).sum() * factor(i) for i in range(3)))
    chunk.weight.grad = None
    returned = schedule([chunk], layout(), num_microbatches=3, forward_only=True)
    assert len(returned) == 3 and chunk.weight.grad is None


def pipeline() -> None:
    start(pp=2)
    _compare_pipeline(layout(pp=2), num_microbatches=4)


def interleaved_pipeline() -> None:
    start(pp=2, vpp=2)
    _compare_pipeline(layout(pp=2, vpp=2), num_microbatches=4)


def _compare_pipeline(shape: Layout, num_microbatches: int) -> None:
    """Compares the gradients of chunks that each multiply by one weight: the product of the others, times inputs."""
    chunks = [Chunk(part * shape.pp + rank(), part, shape) for part in range(shape.vpp)]
    weights = [float(2 + i) for i in range(shape.pp * shape.vpp)]
    for forward_only in (True, False):
        returned = schedule(chunks, shape, num_microbatches, forward_only=forward_only)
        assert [value.tolist() for value in returned] == (
            [[float(i)] for i in range(num_microbatches)] if rank() else []
        )
    whole = sum(inputs(i).sum() * factor(i) for i in range(num_microbatches))
    for chunk in chunks:
        others = torch.tensor([weight for i, weight in enumerate(weights) if i != chunk.index]).prod()
        close(chunk.weight.grad, whole * others)
        for i, tensor in enumerate(chunk.received[:num_microbatches]):
            if chunk.index:
                assert isinstance(tensor, torch.Tensor) and tensor.shape == (SEQUENCE, BATCH, IN)
                close(tensor, inputs(i) * torch.tensor(weights[: chunk.index]).prod())
            else:
                assert tensor is None


class Chunk(nn.Module):
    """Model of one weight, with the attributes that megatron-core's schedules use."""

    def __init__(self, index: int, part: int, shape: Layout):
        super().__init__()
        self.index, self.is_last = index, index == shape.pp * shape.vpp - 1
        self.weight = nn.Parameter(torch.tensor(2.0 + index))
        self.config = megatron.schedule_config(MODEL, shape, torch.float32)
        self.model_type, self.vp_stage = megatron.ModelType.encoder_or_decoder, part
        self.received: list[torch.Tensor | None] = []

    def set_input_tensor(self, tensor: Any) -> None:
        (tensor,) = tensor if isinstance(tensor, list) else (tensor,)
        self.received.append(tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x if self.received[-1] is None else self.received[-1])


def schedule(chunks: list[Chunk], shape: Layout, num_microbatches: int, forward_only: bool = False) -> list[Any]:
    """Calls the schedule as pretrain's engine does; each micro-batch has its own factor in the loss."""
    microbatches = [iter(range(num_microbatches)) for _ in chunks]

    def forward_step(batches: Iterator[int], chunk: Chunk) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        i = next(batches)
        return chunk(inputs(i)), lambda y: (
            y.sum() * factor(i),
            torch.zeros((), dtype=torch.int),
            torch.tensor([i + 0.0]),
        )

    return megatron.get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=microbatches if len(chunks) > 1 else microbatches[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=forward_only,
    )


def inputs(i: int) -> torch.Tensor:
    return drawn(SEQUENCE, BATCH, IN, seed=10 + i)


def factor(i: int) -> float:
    return 1.0 + i


def layout(tp: int = 1, sp: bool = False, cp: int = 1, pp: int = 1, vpp: int = 1) -> Layout:
    """Returns a layout without data parallelism."""
    rest = {"ep": 1, "dp": 1, "zero": 1, "offload_optimizer": False, "grad_accum_steps": 1, "layers_per_stage": ()}
    return Layout(world_size=tp * cp * pp, tp=tp, sp=sp, cp=cp, pp=pp, vpp=vpp, **rest)  # type: ignore[arg-type]


def start(tp: int = 1, cp: int = 1, pp: int = 1, ep: int = 1, vpp: int = 1) -> None:
    """Makes megatron-core's groups over both ranks."""
    megatron.redirect_to_cpu()
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        vpp if vpp > 1 else None,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=1,
    )


def layer_config(tp: int, sequence_parallel: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    return megatron.ModelParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
    )


def rank() -> int:
    return dist.get_rank()


def tp_group() -> dist.ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def members(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draws random numbers that are the same in every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(weight: nn.Parameter, values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        weight.copy_(values)
    return values


def close(actual: torch.Tensor | None, expected: Any) -> None:
    """Asserts that sums of a few dozen fp32 numbers of size 1 are equal up to the order of summation."""
    assert actual is not None
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected).detach(), rtol=1e-5, atol=1e-4)


IN_TWO_RANKS = (
    column_layer,
    row_layer,
    embedding,
    regions,
    exchange,
    process_groups,
    schedule_without_pipeline,
    pipeline,
    interleaved_pipeline,
)
