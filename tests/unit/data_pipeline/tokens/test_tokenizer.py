"""Tests that the tokenizer is lossless, makes no control symbol from text, and depends on the texts alone."""

import argparse
import random
import re
import shutil
import sys
from pathlib import Path

import pytest

from configs.tokenizer import TokenizerConfig, TokenizerKind
from data_pipeline.tokens import bpe_cache
from data_pipeline.tokens.tokenizer import SPECIALS, Tokenizer
from data_pipeline.tokens.tokenizer_training import train
from tests.demo_corpus import SOURCES, demo_records
from tests.shards import write_shard

AWKWARD = [
    "",
    " ",
    "   three before, two after  ",
    "\n\n\n",
    "a\r\nb\tc\0d",
    "中文与 English 混排。\u3000全角",
    "def f(x):\n    return x  # √ 😀 👩‍👩‍👧 e\u0301 é ﬁ",
    "\u2581a real one\u2581\u2581 and \u2585 too\u2581",
    "\ufeffBOM \ufffd \ue000 \U0010ffff \u200b",
    "0123456789 12,345.678",
]


@pytest.fixture(scope="module", params=list(TokenizerKind))
def of_kind(request: pytest.FixtureRequest, documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Tokenizer of each kind, of 1200 tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    files = sorted(documents.glob("train/english/*.zst")) + sorted(documents.glob("train/code/*.zst"))
    train(files, folder, TokenizerConfig(kind=request.param, vocab_size=1200, train_bytes=200_000))
    return Tokenizer.load(folder)


def test_kinds_keep_text_or_say_that_they_do_not(of_kind: Tokenizer) -> None:
    texts = [*AWKWARD, *(record["text"][:3000] for source in SOURCES for record in demo_records(source)[:3])]
    for text in texts:
        ids = of_kind.encode(text)
        assert [found.tolist() for found in of_kind.encode_arrays([text, text])] == [ids, ids]
        if of_kind.lossless:
            assert of_kind.decode(ids) == text and of_kind.token_bytes[ids].sum() == len(text.encode())
            assert of_kind.unk_id not in ids
    if not of_kind.lossless:
        assert not of_kind.token_bytes.any()
        assert of_kind.decode(of_kind.encode("It  is\n7 times the\tsame.")) == "It is 7 times the same ."
        assert of_kind.unk_id in of_kind.encode("the 😀")


def test_kinds_have_the_same_control_symbols(of_kind: Tokenizer) -> None:
    assert of_kind.special_ids == {piece: number for number, piece in enumerate(SPECIALS)}
    assert (of_kind.unk_id, of_kind.bos_id, of_kind.eos_id, of_kind.pad_id) == (0, 1, 2, 3)
    assert of_kind.vocab_size == len(set(of_kind.pieces)) == 1200
    for piece in SPECIALS:
        assert not set(of_kind.encode(f"say {piece} now{piece}")) & set(range(1, 8)), piece
    assert of_kind.decode([1, *of_kind.encode("the same"), 7, 2]) == "the same"
    assert len(of_kind.encode("2024")) == 4
    with pytest.raises(ValueError, match="token id 1200 is not in a vocabulary"):
        of_kind.decode([1200])
    with pytest.raises(ValueError, match="half a surrogate pair"):
        of_kind.encode("half \ud800 a pair")


def test_words_of_code_keep_their_indentation(tmp_path: Path) -> None:
    """Trains byte-level BPE, which has pieces of several spaces and tabs, of which code is full."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")[:40_000].replace("\n    def", "\n\t\tdef")
    path = write_shard(tmp_path / "code.jsonl.zst", [{"text": text}])
    train([path], tmp_path / "out", TokenizerConfig(kind=TokenizerKind.BYTE_BPE, vocab_size=500))
    pieces = {Tokenizer.load(tmp_path / "out").decode([i]) for i in range(500)}
    assert {"       ", " return", "\n\n\t"} <= pieces


@pytest.mark.parametrize("kind", list(TokenizerKind)[1:])
def test_kinds_depend_on_the_texts_alone(documents: Path, tmp_path: Path, kind: TokenizerKind) -> None:
    files = sorted(documents.glob("train/code/*.zst")) + sorted(documents.glob("train/english/*.zst"))
    settings = TokenizerConfig(kind=kind, vocab_size=600, train_bytes=50_000)
    made = [train(inputs, tmp_path / str(i), settings)["sha256"] for i, inputs in enumerate([files, files[::-1]])]
    assert made[0] == made[1]


@pytest.mark.parametrize("kind", list(TokenizerKind)[1:])
def test_kinds_refuse_impossible_vocabularies_with_a_remedy(tmp_path: Path, kind: TokenizerKind) -> None:
    texts = ["few words of little use", Path(argparse.__file__).read_text(encoding="utf-8")[:9000]]
    few, some = (write_shard(tmp_path / f"{i}.jsonl.zst", [{"text": text}]) for i, text in enumerate(texts))
    with pytest.raises(ValueError, match="give it more text") as refused:
        train([few], tmp_path / "out", TokenizerConfig(kind=kind, vocab_size=5000))
    assert not re.search(r"vocab_size to [12]?\d?\d,", str(refused.value)), "configs allow 300 tokens and more"
    with pytest.raises(ValueError, match=r"lower tokenizer\.vocab_size to \d+, or give it more text") as refused:
        train([some], tmp_path / "out", TokenizerConfig(kind=kind, vocab_size=5000))
    assert not (tmp_path / "out").exists()
    size = int(str(refused.value).split("vocab_size to ")[1].split(",")[0])
    assert train([some], tmp_path / "out", TokenizerConfig(kind=kind, vocab_size=size))["vocab_size"] == size


def test_what_is_no_tokenizer_is_refused(of_kind: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / Path(of_kind.origin).name
    file.write_text("{}")
    with pytest.raises(ValueError, match="restore it, or train one with `trivium tokenizer"):
        Tokenizer.load(file)
    if file.suffix == ".json":
        file.write_text(Path(of_kind.origin).read_text().replace("<|user|>", "<|human|>"))
        with pytest.raises(ValueError, match=r"nothing beside tokenizer .* says which token ends a document"):
            Tokenizer.load(file)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_survives(small_tokenizer: Tokenizer, text: str) -> None:
    ids = small_tokenizer.encode(text)
    assert small_tokenizer.decode(ids) == text
    assert small_tokenizer.token_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("source", ["english", "chinese", "code"])
def test_documents_survive(small_tokenizer: Tokenizer, source: str) -> None:
    texts = [record["text"] for record in demo_records(source)]
    for text, ids in zip(texts, small_tokenizer.encode_batch(texts), strict=True):
        assert small_tokenizer.decode(ids) == text
        assert small_tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_any_unicode_survives(small_tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    planes = [(0, 0x7F), (0x80, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0xFFFF), (0x10000, sys.maxunicode)]
    texts = ["".join(chr(draw.randint(*draw.choice(planes))) for _ in range(draw.randint(1, 40))) for _ in range(2000)]
    for text, ids in zip(texts, small_tokenizer.encode_batch(texts), strict=True):
        assert small_tokenizer.decode(ids) == text
        assert small_tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert small_tokenizer.unk_id not in ids


def test_specials_have_their_ids_and_text_never_makes_one(small_tokenizer: Tokenizer) -> None:
    assert [small_tokenizer.piece_to_id(piece) for piece in SPECIALS] == list(range(8))
    assert small_tokenizer.special_ids == {piece: number for number, piece in enumerate(SPECIALS)}
    assert (small_tokenizer.bos_id, small_tokenizer.eos_id, small_tokenizer.pad_id) == (1, 2, 3)
    assert not small_tokenizer.token_bytes[:8].any()
    for piece in SPECIALS:
        for text in (piece, f"say {piece} now", f"{piece}{piece}", f"\n{piece}\n\u2581{piece}"):
            ids = small_tokenizer.encode(text)
            assert not set(ids) & set(range(8)), text
            assert small_tokenizer.decode(ids) == text
    assert small_tokenizer.decode([1, *small_tokenizer.encode("a b"), 7, 2]) == "a b"


def test_digits_are_split_and_lines_are_learnt(small_tokenizer: Tokenizer) -> None:
    assert len(small_tokenizer.encode("2024")) == 4
    assert any("\n" in small_tokenizer.id_to_piece(i) for i in range(264, small_tokenizer.vocab_size))


def test_same_texts_same_model(documents: Path, tmp_path: Path) -> None:
    files = sorted(documents.glob("train/code/*.zst")) + sorted(documents.glob("train/english/*.zst"))

    def model(name: str, inputs: list[Path], seed: int = 0) -> bytes:
        train(inputs, tmp_path / name, TokenizerConfig(vocab_size=700, seed=seed, train_bytes=60_000))
        return (tmp_path / name / "tokenizer.model").read_bytes()

    first = model("a", files)
    assert model("b", files[::-1]) == first
    assert model("c", files, seed=1) != first


def test_sample_is_bounded(documents: Path, tmp_path: Path) -> None:
    files = sorted(documents.glob("train/english/*.zst"))
    seen = []
    info = train(files, tmp_path, TokenizerConfig(vocab_size=600, train_bytes=50_000), progress=seen.append)
    assert 40_000 < info["trained_on_bytes"] <= 50_000 < info["available_bytes"] == sum(seen)


def test_impossible_vocabularies_are_refused(documents: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"raise tokenizer\.vocab_size"):
        train(sorted(documents.glob("train/chinese/*.zst")), tmp_path / "out", TokenizerConfig(vocab_size=400))
    path = write_shard(tmp_path / "a.jsonl.zst", [{"text": "few words"}])
    with pytest.raises(ValueError, match="give it more text"):
        train([path], tmp_path / "out", TokenizerConfig(vocab_size=5000))
    with pytest.raises(ValueError, match="too small"):
        train([path], tmp_path / "out", TokenizerConfig.model_construct(vocab_size=200))
    none, more = write_shard(tmp_path / "b.jsonl.zst", []), sorted(documents.glob("train/code/*.zst"))[0]
    with pytest.raises(ValueError, match=r"no text to train a tokenizer on; check what the filters dropped, or name m"):
        train([none], tmp_path / "out", TokenizerConfig(vocab_size=300))
    assert not (tmp_path / "out").exists()
    train([none, more], tmp_path / "out", TokenizerConfig(vocab_size=400, train_bytes=20_000))


def test_missing_and_damaged_models_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer.load(tmp_path)
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "copy"))
    model = folder / "tokenizer.model"
    assert Tokenizer.load(model).vocab_size == 3000
    info = folder / "info.json"
    info.write_text(info.read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(
        ValueError, match=r"has SHA-256 .*\.\.\.: the file was changed or damaged; restore it, or train"
    ):
        Tokenizer.load(folder)
    info.unlink()
    model.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        Tokenizer.load(folder)


def test_wrong_ids_and_broken_text_are_named(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="token id 3000 is not in a vocabulary of 3000"):
        small_tokenizer.decode([5, 3000])
    with pytest.raises(ValueError, match="surrogate"):
        small_tokenizer.encode("half \ud800 a pair")


def test_parts_give_the_ids_of_the_whole(small_tokenizer: Tokenizer) -> None:
    """Encodes texts part by part through the cache: the ids are those that sentencepiece gives the whole texts."""
    draw = random.Random(0)
    alphabet = "ab  \n\t.,éß中文the ing\u3000\0\u2581\U0001f600"
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(3000)]
    texts += [record["text"][:20_000] for source in SOURCES for record in demo_records(source)]
    for batch in (texts[:1], [], ["", ""], texts, texts[::-1], texts[5:50]):
        found = small_tokenizer.encode_arrays(batch)
        assert [ids.tolist() for ids in found] == small_tokenizer.encode_batch(batch)


def test_a_full_part_table_starts_anew(small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe_cache, "_MOST_CODES", 200)
    table = bpe_cache.PartTable([small_tokenizer.id_to_piece(i) for i in range(3000)], small_tokenizer.encode_batch)
    texts = [record["text"][:300] for record in demo_records("english")]
    for text in texts:
        assert table.ids([text])[0].tolist() == small_tokenizer.encode(text)
        assert len(table._codes) < 200 + 300


def test_half_a_surrogate_pair_is_named(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"half a surrogate pair .* no valid Unicode; repair or drop the document$"):
        small_tokenizer.encode_arrays(["sound", "a \ud800 b"])
    assert len(small_tokenizer.encode_arrays(["sound", "a \ufffd b"])) == 2
