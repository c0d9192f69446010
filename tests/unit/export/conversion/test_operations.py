"""Every operation between Trivium's tensors and the file's loses nothing, and puts each number where it belongs."""

import pytest
import torch

from configs.loader import validate
from configs.model import ModelConfig
from export.conversion.operations import (
    Copy,
    HeadByHead,
    Interleave,
    Join,
    Operation,
    Rotary,
    RowOffset,
    SplitExperts,
    Transpose,
    chain,
    their_shapes,
)

HEADS, HEAD, HIDDEN, INNER, EXPERTS = 3, 4, 10, 6, 5
QKV = [(HEADS * HEAD, HIDDEN)] * 3
GROUPED = [(HEADS * HEAD, HIDDEN), (HEAD, HIDDEN), (HEAD, HIDDEN)]
GATE_UP = [(EXPERTS, INNER, HIDDEN)] * 2


def model(**position) -> ModelConfig:
    sizes = {"vocab_size": 16, "num_layers": 1, "hidden_size": HIDDEN, "ffn_hidden_size": 8, "num_heads": HEADS}
    more = {"num_kv_heads": HEADS, "head_dim": HEAD, "position": position}
    return validate(ModelConfig, {**sizes, **more, "moe": {"num_experts": EXPERTS}})


def numbered(shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Returns tensors of which no two elements are equal."""
    counts = [torch.Size(shape).numel() for shape in shapes]
    parts = torch.arange(sum(counts)).float().split(counts)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


CASES: dict[str, tuple[Operation, list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "copy": (Copy(), [(3, 7)], [(3, 7)]),
    "transpose": (Transpose(), [(3, 7), (2, 3, 7)], [(7, 3), (2, 7, 3)]),
    "rotary weight": (Rotary("pairs"), QKV[:1], QKV[:1]),
    "rotary bias": (Rotary("pairs"), [(HEADS * HEAD,)], [(HEADS * HEAD,)]),
    "only queries and keys": (Rotary("pairs", first=2), GROUPED, GROUPED),
    "thirds": (Join(), QKV, [(3 * HEADS * HEAD, HIDDEN)]),
    "thirds transposed": (chain(Join(), Transpose()), QKV, [(HIDDEN, 3 * HEADS * HEAD)]),
    "grouped in one": (Join(), GROUPED, [((HEADS + 2) * HEAD, HIDDEN)]),
    "biases in one": (Join(), [(12,), (4,), (4,)], [(20,)]),
    "head by head": (HeadByHead(), QKV, [(3 * HEADS * HEAD, HIDDEN)]),
    "head by head, biases": (HeadByHead(), [(HEADS * HEAD,)] * 3, [(3 * HEADS * HEAD,)]),
    "gate and up": (Join(), [(INNER, HIDDEN)] * 2, [(2 * INNER, HIDDEN)]),
    "interleaved": (Interleave(), [(INNER, HIDDEN)] * 2, [(2 * INNER, HIDDEN)]),
    "stacked experts": (chain(Join(1), Transpose()), GATE_UP, [(EXPERTS, HIDDEN, 2 * INNER)]),
    "stacked and interleaved": (chain(Interleave(1), Transpose()), GATE_UP, [(EXPERTS, HIDDEN, 2 * INNER)]),
    "experts' biases": (Interleave(1), [(EXPERTS, INNER)] * 2, [(EXPERTS, 2 * INNER)]),
    "split experts": (SplitExperts(), GATE_UP[:1], [(INNER, HIDDEN)] * EXPERTS),
    "split, gate and up in one": (chain(Join(1), SplitExperts()), GATE_UP, [(2 * INNER, HIDDEN)] * EXPERTS),
    "row offset": (RowOffset(2), [(9, HIDDEN)], [(11, HIDDEN)]),
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_the_same(case):
    operation, shapes, expected = CASES[case]
    ours, config = numbered(shapes), model()
    theirs = operation.to_theirs(ours, config)
    assert [tuple(tensor.shape) for tensor in theirs] == expected == their_shapes(operation, shapes, config)
    back = operation.to_ours([tensor.contiguous() for tensor in theirs], shapes, config)
    assert [tuple(tensor.shape) for tensor in back] == shapes
    assert all(torch.equal(one, other) for one, other in zip(ours, back, strict=True))


def test_thirds_and_head_by_head_are_not_the_same():
    q, k, v = numbered([(4, 1)] * 3)  # two heads of two elements
    config = validate(
        ModelConfig, {**model().model_dump(mode="json"), "num_heads": 2, "num_kv_heads": 2, "head_dim": 2}
    )
    assert Join().to_theirs([q, k, v], config)[0].flatten().tolist() == [*range(12)]
    assert HeadByHead().to_theirs([q, k, v], config)[0].flatten().tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]


def test_halves_become_pairs_in_each_head_and_what_is_not_rotated_stays():
    q = torch.arange(8).float()  # two heads of four
    config = validate(ModelConfig, {**model().model_dump(mode="json"), "num_heads": 2, "num_kv_heads": 2})
    assert Rotary("pairs").to_theirs([q], config)[0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert Rotary("halves").to_theirs([q], config)[0].tolist() == q.tolist()
    wide = numbered([(8,)])
    half = validate(ModelConfig, {**model(fraction=0.5).model_dump(mode="json"), "head_dim": 8})
    assert Rotary("pairs").to_theirs(wide, half)[0].tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    from_pairs = validate(ModelConfig, {**model(layout="pairs").model_dump(mode="json"), "head_dim": 8})
    pairs = Rotary("halves").to_theirs(wide, from_pairs)
    assert pairs[0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert Rotary("halves").to_ours(pairs, [(8,)], from_pairs)[0].tolist() == wide[0].tolist()


def test_only_the_first_tensors_are_moved():
    queries, keys, values = numbered(GROUPED)
    moved = Rotary("pairs", first=2).to_theirs([queries, keys, values], model())
    assert not torch.equal(moved[0], queries)
    assert not torch.equal(moved[1], keys)
    assert torch.equal(moved[2], values)


def test_latent_attention_rotates_the_last_elements_of_heads_and_of_the_latent_vector():
    latent = {"kv_rank": 3, "nope_head_dim": 2, "rope_head_dim": 4, "v_head_dim": 2}
    tree = model().model_dump(mode="json", exclude_none=True)
    del tree["head_dim"]
    config = validate(ModelConfig, tree | {"attention": {"latent": latent}})
    queries, shared = Rotary("pairs"), Rotary("pairs", shared=True)
    two_heads, vector = numbered([(12,)]), numbered([(7,)])
    assert queries.to_theirs(two_heads, config)[0].tolist() == [0, 1, 2, 4, 3, 5, 6, 7, 8, 10, 9, 11]
    assert shared.to_theirs(vector, config)[0].tolist() == [0, 1, 2, 3, 5, 4, 6]
    for operation, whole in ((queries, two_heads), (shared, vector)):
        theirs = operation.to_theirs(whole, config)
        assert torch.equal(operation.to_ours(theirs, [whole[0].shape], config)[0], whole[0])


def test_rows_of_no_position_are_kept_or_zeros():
    table = torch.arange(12.0).view(4, 3) + 1
    operation, config = RowOffset(2), model()
    left = operation.left_over([table])
    ours = operation.to_ours([table], [(2, 3)], config)
    assert left is not None
    assert torch.equal(operation.put_back(operation.to_theirs(ours, config), left)[0], table)
    assert operation.to_theirs(ours, config)[0][:2].eq(0).all()
