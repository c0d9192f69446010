"""Tests that packings use every token once; compares best-fit with a simple version, concat with plain cutting."""

import numpy as np
import pytest

from data_pipeline.mixture.packing import PACKINGS, Packed, best_fit, concat

LENGTHS = [
    [],
    [0, 0],
    [1],
    [8],
    [9],
    [16],
    [3, 5, 8, 1, 7, 20, 2, 2, 2, 0, 15],
    *(np.random.default_rng(seed).integers(0, 60, 200).tolist() for seed in range(4)),
    *(np.random.default_rng(seed).geometric(0.3, 500).tolist() for seed in range(4)),
]


def tokens_packed(packed: Packed) -> list[tuple[int, int]]:
    return [
        (int(document), int(start) + k)
        for document, start, length in zip(packed.document, packed.start, packed.length, strict=True)
        for k in range(length)
    ]


def row_sizes(packed: Packed) -> np.ndarray:
    return np.add.reduceat(packed.length, packed.offsets[:-1]) if len(packed) else np.zeros(0, int)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("seq_length", [1, 8, 13])
def test_every_token_once_and_no_row_too_long(packing: str, lengths: list[int], seq_length: int) -> None:
    packed = PACKINGS[packing](lengths, seq_length)
    expected = [(document, k) for document, length in enumerate(lengths) for k in range(length)]
    assert sorted(tokens_packed(packed)) == expected
    assert (packed.length > 0).all()
    assert packed.offsets[0] == 0 and packed.offsets[-1] == len(packed.length)
    assert (np.diff(packed.offsets) > 0).all() and (row_sizes(packed) <= seq_length).all()


@pytest.mark.parametrize("lengths", LENGTHS)
def test_concat_keeps_the_order_and_fills_all_rows_but_the_last(lengths: list[int]) -> None:
    packed = concat(lengths, 8)
    stream = [(document, k) for document, length in enumerate(lengths) for k in range(length)]
    assert tokens_packed(packed) == stream
    assert (row_sizes(packed)[:-1] == 8).all()
    assert len(packed) == -(-len(stream) // 8)


def plain_best_fit(lengths: list[int], seq_length: int) -> list[int]:
    """Returns row sizes by the definition of best-fit: of all rows with room, each piece goes to the fullest."""
    pieces = sorted(
        (min(seq_length, length - at) for length in lengths for at in range(0, length, seq_length)), reverse=True
    )
    rows: list[int] = []
    for piece in pieces:
        fitting = [row for row in range(len(rows)) if rows[row] + piece <= seq_length]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += piece
        else:
            rows.append(piece)
    return sorted(rows)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("seq_length", [4, 13, 64])
def test_best_fit_is_best_fit_decreasing(lengths: list[int], seq_length: int) -> None:
    packed = best_fit(lengths, seq_length)
    assert sorted(row_sizes(packed).tolist()) == plain_best_fit(lengths, seq_length)


def test_best_fit_cuts_only_documents_longer_than_a_row() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    packed = best_fit(lengths, 16)
    pieces = np.bincount(packed.document, minlength=len(lengths))
    np.testing.assert_array_equal(pieces, -(-lengths // 16))
    assert packed.stats(lengths, 16)["needless_cut_share"] == 0
    assert concat(lengths, 16).stats(lengths, 16)["needless_cut_share"] > 0.1


def test_a_row_of_one_document_is_iterable_as_document_indices() -> None:
    assert sorted(map(sorted, best_fit([5, 3, 8, 2], 8))) == [[0, 1], [2], [3]]


def test_take_keeps_rows_whole() -> None:
    packed = best_fit([5, 3, 8, 2, 30], 8)
    order = np.array([3, 0])
    taken = packed.take(order)
    for new, old in enumerate(order):
        for name in ("document", "start", "length"):
            ours = getattr(taken, name)[taken.offsets[new] : taken.offsets[new + 1]]
            theirs = getattr(packed, name)[packed.offsets[old] : packed.offsets[old + 1]]
            np.testing.assert_array_equal(ours, theirs)


def test_stats_by_hand() -> None:
    # Rows of 4: [a a a b] [b b c -]: b is cut although it would fit.
    assert concat([3, 3, 1], 4).stats(np.array([3, 3, 1]), 4) == {
        "padding_share": pytest.approx(1 / 8),
        "cut_share": pytest.approx(1 / 3),
        "needless_cut_share": pytest.approx(1 / 3),
    }


def test_impossible_input_is_refused() -> None:
    with pytest.raises(ValueError, match="seq_length = 0"):
        best_fit([1], 0)
    with pytest.raises(ValueError, match="document lengths must be one list of numbers, none below 0"):
        concat([3, -1], 8)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_extra_positions_find_room(packing: str, lengths: list[int]) -> None:
    extra = np.where(np.random.default_rng(1).random(len(lengths)) < 0.5, 3, 0)
    packed = PACKINGS[packing](lengths, 8, extra)
    expected = [(document, k) for document, length in enumerate(lengths) for k in range(length)]
    assert sorted(tokens_packed(packed)) == expected
    sizes = packed.length + extra[packed.document]
    rows = np.add.reduceat(sizes, packed.offsets[:-1]) if len(packed) else np.zeros(0, int)
    assert (np.diff(packed.offsets) > 0).all() and (rows <= 8).all()
    if packing == "concat":  # a row ends early only if it has no room for a token of the next piece
        following = extra[packed.document[packed.offsets[1:-1]]]
        assert (8 - rows[:-1] <= following).all()
    told = packed.stats(np.array(lengths), 8, extra)["padding_share"]
    assert told == pytest.approx(1 - sizes.sum() / max(1, 8 * len(packed)))


def test_a_row_without_room_beside_the_symbols_is_refused() -> None:
    with pytest.raises(ValueError, match="seq_length = 3: a row needs room for at least one token beside 3 symbols"):
        concat([4], 3, 3)
