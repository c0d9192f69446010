"""The exported fast tokenizer gives the same ids as sentencepiece."""

import json
import random
import shutil
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import Tokenizer as PlainTokenizer
from transformers import AutoTokenizer

from configs.tokenizer import TokenizerConfig, TokenizerKind
from data_pipeline.tokens.tokenizer import SPACE, Tokenizer
from data_pipeline.tokens.tokenizer_training import train
from export.checks import ODD_TEXTS
from export.hf_tokenizer import PIECE, convert, first_difference, read_model, write_tokenizer
from posttrain.chat.chat_format import ChatFormat, jinja_template
from tests.shards import write_shard
from tests.tiny_models import CHINESE, ENGLISH, odd_strings

TEMPLATE = "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("fast")
    write_tokenizer(folder, tokenizer_path, max_length=128, chat_template=TEMPLATE)
    # AutoTokenizer decides by model_type, and must not choose LLaMA's class, which adds a leading space.
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_same_ids_on_prose_code_and_odd_strings(folder: Path, tokenizer_path: Path):
    fast = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    pieces = [p.piece.replace(SPACE, " ") for p in read_model(tokenizer_path).pieces if p.type == PIECE.NORMAL]
    code = Path(random.__file__).read_text(encoding="utf-8")
    texts = [CHINESE, ENGLISH, code, *ODD_TEXTS, *odd_strings(1500, pieces)]
    assert first_difference(fast, Tokenizer.load(tokenizer_path), texts) is None


@pytest.mark.parametrize("kind", list(TokenizerKind)[1:])
def test_other_kinds_give_the_same_ids(tmp_path: Path, kind: TokenizerKind):
    """Compares ids of runs of spaces and newlines, spelled control symbols and byte tokens, also in a template."""
    code = Path(random.__file__).read_text(encoding="utf-8")
    texts = [code[i : i + 1500] for i in range(0, len(code), 1500)] + [CHINESE, ENGLISH] * 5
    shard = write_shard(tmp_path / "text.jsonl.zst", [{"text": text} for text in texts])
    train([shard], tmp_path / "own", TokenizerConfig(kind=kind, vocab_size=900))
    own = Tokenizer.load(tmp_path / "own")
    runs = [f"a{sign * size}b" for sign in (" ", "\n", "\t") for size in (1, 2, 3, 6, 7, 31, 400)]
    odd = [*odd_strings(800, own.pieces[8:]), "<0x0A><0x41> <s><|user|>", *runs]
    for template in (TEMPLATE, None):
        folder = tmp_path / f"hf_{template is None}"
        folder.mkdir()
        write_tokenizer(folder, own.origin, max_length=128, chat_template=template)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        fast = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert first_difference(fast, own, [*texts, *ODD_TEXTS, *odd]) is None
        assert fast("of wisdom").input_ids == [1] * (template is None) + own.encode("of wisdom")
        assert (fast.unk_token_id, fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (0, 1, 2, 3)
        assert fast.encode("<|user|>of<|end|>", add_special_tokens=False) == [5, *own.encode("of"), 7]


def test_a_wrong_merge_order_is_noticed(folder: Path, tokenizer_path: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "broken")
    raw = json.loads((tmp_path / "broken/tokenizer.json").read_text())
    raw["model"]["merges"].reverse()
    (tmp_path / "broken/tokenizer.json").write_text(json.dumps(raw))
    fast = AutoTokenizer.from_pretrained(tmp_path / "broken", local_files_only=True)
    difference = first_difference(fast, Tokenizer.load(tokenizer_path), [ENGLISH])
    assert difference is not None
    assert "It was the best" in difference


def test_special_tokens(folder: Path, tokenizer_path: Path):
    fast = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    slow = Tokenizer.load(tokenizer_path)
    assert (fast.unk_token_id, fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (0, 1, 2, 3)
    assert fast("of wisdom").input_ids == slow.encode("of wisdom")  # the template has <s>
    assert fast.encode("<|user|>of wisdom<|end|>", add_special_tokens=False) == [
        5,
        *slow.encode("of wisdom"),
        7,
    ]
    assert fast.decode([1, *slow.encode("  of\twisdom\n"), 2], skip_special_tokens=True) == "  of\twisdom\n"
    rendered = fast.apply_chat_template([{"role": "user", "content": "hope"}], tokenize=False)
    assert rendered == "<s><|user|>hope<|end|>"


@pytest.mark.parametrize("template", [jinja_template(), None])
def test_one_bos_by_every_way(tmp_path: Path, tokenizer_path: Path, template: str | None):
    """Counts <s> in rendered dialogues and plain text: one in each, as the keys that converters read say."""
    write_tokenizer(tmp_path, tokenizer_path, max_length=128, chat_template=template)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    fast, slow = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True), Tokenizer.load(tokenizer_path)
    keys = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (keys["add_bos_token"], keys["add_eos_token"], keys["add_prefix_space"]) == (template is None, False, False)
    plain = slow.encode("of wisdom")
    alone = PlainTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for tokenizer in (fast, alone):
        ids = [tokenizer.encode("of wisdom", add_special_tokens=add) for add in (True, False)]
        ids = [getattr(found, "ids", found) for found in ids]
        assert ids == [[1, *plain] if template is None else plain, plain]
    if template is None:
        return
    messages = [
        {"role": "system", "content": "of <s> times"},
        {"role": "user", "content": "of wisdom"},
        {"role": "assistant", "content": "it was"},
        {"role": "user", "content": " the age"},
    ]
    expected = ChatFormat(slow).render_prompt(messages)
    assert expected.count(1) == 1
    rendered = fast.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected
    for add in (True, False):
        assert fast(rendered, add_special_tokens=add).input_ids == expected
        assert alone.encode(rendered, add_special_tokens=add).ids == expected


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda m: setattr(m.trainer_spec, "model_type", proto.TrainerSpec.WORD), "neither BPE nor Unigram"),
        (lambda m: setattr(m.normalizer_spec, "add_dummy_prefix", True), "add_dummy_prefix"),
        (lambda m: setattr(m.normalizer_spec, "name", "nmt_nfkc"), "normalizer.name"),
        (lambda m: setattr(m.trainer_spec, "byte_fallback", False), "byte_fallback"),
        (lambda m: setattr(m.pieces[-1], "type", PIECE.USER_DEFINED), "user-defined"),
    ],
)
def test_models_without_an_exact_twin_are_refused(tmp_path: Path, tokenizer_path: Path, change, key: str):
    model = proto.ModelProto()
    model.ParseFromString(tokenizer_path.read_bytes())
    change(model)
    (tmp_path / "other.model").write_bytes(model.SerializeToString())
    remedy = r"declare them as control symbols" if key == "user-defined" else r"train the tokenizer with the pipeline's"
    with pytest.raises(ValueError, match=rf"{key}.*; {remedy}"):
        read_model(tmp_path / "other.model")
    if key == "user-defined":
        model.pieces[-1].type = PIECE.CONTROL
        (tmp_path / "other.model").write_bytes(model.SerializeToString())
        assert read_model(tmp_path / "other.model").pieces[-1].type == PIECE.CONTROL


def test_a_damaged_file_is_told(tmp_path: Path):
    (tmp_path / "damaged.model").write_bytes(b"\xff\xffnot a model")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        read_model(tmp_path / "damaged.model")


def test_a_model_is_converted_once_its_pieces_are_all_different(tokenizer_path: Path) -> None:
    model = read_model(tokenizer_path)
    whole = model.SerializeToString()
    model.pieces[-1].piece = model.pieces[-2].piece
    with pytest.raises(ValueError, match="two pieces of the same text; it is damaged, train it again"):
        convert(model)
    model.ParseFromString(whole)
    assert convert(model).get_vocab_size() == len(model.pieces)
