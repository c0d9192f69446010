"""Tokenizers that were trained elsewhere: their own ids, the roles of their tokens, and data runs with them."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from configs.loader import ConfigError
from configs.tokenizer import TokenizerConfig, TokenizerKind
from data_pipeline.command import main as data_run
from data_pipeline.mixture.rows import Plan
from data_pipeline.tokens.chat_encoder import ChatEncoder, ForgedToken
from data_pipeline.tokens.foreign import Named, adopt, load_named
from data_pipeline.tokens.store import SourceStores
from data_pipeline.tokens.tokenizer import Tokenizer, difference_of_files
from tests.data_runs import data_config
from tests.foreign_tokenizers import MAKERS, TEMPLATE, TEXTS, bert, gpt2, llama2, llama3, qwen, t5, write

ODD = [
    "",
    " ",
    "  two\n\n\t tabs ",
    "e\u0301 é ﬁ \u00a0 \u200b \0\x7f",
    "👩‍👩‍👧 😀 中文 \u2581 x",
    "word " * 300,
    *TEXTS[::9],
]
ENDS = {bert: "[SEP]"}  # where no file names the end of a document

Maker = Callable[[], tuple[tokenizers.Tokenizer, dict]]


def strings(count: int) -> list[str]:
    draw = random.Random(0)
    parts = [
        "<",
        "|",
        ">",
        "/s",
        "s",
        "a",
        " ",
        "  ",
        "\n",
        "é",
        "e\u0301",
        "中",
        "😀",
        "\u2581",
        "\0",
        "<tool_call>",
        "0",
    ]
    return ["".join(draw.choice(parts) for _ in range(draw.randrange(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module", params=MAKERS, ids=lambda maker: maker.__name__)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Maker, Path]:
    return request.param, write(tmp_path_factory.mktemp("foreign"), *request.param())


def settings(case: tuple[Maker, Path]) -> TokenizerConfig:
    return TokenizerConfig(file=str(case[1]), end_of_document=ENDS.get(case[0]))


def test_the_ids_are_the_library_s(case: tuple[Maker, Path], tmp_path: Path) -> None:
    """Compares ids of whole texts with the library's, whatever tokenizer.json says of truncation and padding."""
    adopt(settings(case), tmp_path / "copy")
    ours = Tokenizer.load(tmp_path / "copy")
    theirs = tokenizers.Tokenizer.from_file(str(case[1] / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    assert (tmp_path / "copy/tokenizer.json").read_bytes() == (case[1] / "tokenizer.json").read_bytes()
    for text in [*ODD, *strings(600)]:
        found = ours.encode(text)
        assert ours.encode_arrays([text, text])[1].tolist() == found
        spelled = [name for name in ours.special_ids if name in text]
        if not spelled:
            assert found == theirs.encode(text, add_special_tokens=False).ids, text
        if ours.lossless:
            assert ours.decode(found) == text and ours.token_bytes[found].sum() == len(text.encode())
    assert max(ours.encode("".join(ODD))) < ours.vocab_size == len(ours.pieces) == len(ours.token_bytes)


def test_text_never_becomes_a_control_symbol(case: tuple[Maker, Path]) -> None:
    ours = load_named(settings(case))
    for name, number in ours.special_ids.items():
        for text in (name, f"a {name}b{name}", f"{name}\0{name}"):
            assert number == ours.unk_id or number not in ours.encode(text), text


@pytest.mark.parametrize("maker", [bert, t5])
def test_words_that_the_tokenizer_does_not_know_forge_no_control_token(maker: Maker, tmp_path: Path) -> None:
    """They become <unk>, of which no message is refused, unless that token ends answers as well."""
    named = Named(ENDS.get(maker, "</s>"), None, None)
    tokenizer = Tokenizer.load(write(tmp_path, *maker()), named=named)
    unknown, end = tokenizer.pieces[tokenizer.unk_id], tokenizer.pieces[tokenizer.eos_id]
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}END{% endfor %}"
    prompt = ChatEncoder(tokenizer, template.replace("END", end)).prompt([{"role": "user", "content": "1 你"}])
    assert prompt.count(tokenizer.unk_id) == 1 and prompt.count(tokenizer.eos_id) == 1
    with pytest.raises(ForgedToken, match="the text of a message was encoded to a control token"):
        ChatEncoder(tokenizer, template.replace("END", unknown)).prompt([{"role": "user", "content": "1 你"}])


@pytest.mark.parametrize(
    ("maker", "begin", "end", "padding", "lossless", "has_bytes"),
    [
        (gpt2, None, "<|endoftext|>", "<|endoftext|>", True, True),
        (llama3, "<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>", True, True),
        (qwen, None, "<|im_end|>", "<|endoftext|>", False, True),
        (llama2, "<s>", "</s>", "</s>", False, True),
        (t5, None, "</s>", "</s>", False, False),
    ],
)
def test_the_roles_are_found_in_the_files(
    maker: Maker, begin: str | None, end: str, padding: str, lossless: bool, has_bytes: bool, tmp_path: Path
) -> None:
    ours = load_named(TokenizerConfig(file=str(write(tmp_path, *maker()))))
    names = [ours.pieces[number] if number >= 0 else None for number in (ours.bos_id, ours.eos_id, ours.pad_id)]
    assert names == [begin, end, padding]
    assert ours.foreign and (ours.lossless, bool(ours.token_bytes.any())) == (lossless, has_bytes)
    if has_bytes:  # a text's bytes, but for the space that a tokenizer may put before it
        text = "def f(x):\n    return 中 é"
        assert ours.token_bytes[ours.encode(text)].sum() - len(text.encode()) in (0, 1)


def test_keys_name_roles_that_no_file_does(tmp_path: Path) -> None:
    folder = write(tmp_path / "bert", *bert())
    with pytest.raises(
        ConfigError, match=r"which token ends a document .*; set tokenizer\.end_of_document to one .*SEP"
    ):
        load_named(TokenizerConfig(file=str(folder)))
    with pytest.raises(
        ConfigError, match=r"tokenizer\.end_of_document = '</s>' is no token of .*; name one that it has"
    ):
        load_named(TokenizerConfig(file=str(folder), end_of_document="</s>"))
    ours = load_named(TokenizerConfig(file=str(folder), end_of_document="[SEP]", begin_of_document="[CLS]"))
    assert [ours.pieces[number] for number in (ours.bos_id, ours.eos_id, ours.pad_id)] == ["[CLS]", "[SEP]", "[PAD]"]
    plain = load_named(
        TokenizerConfig(
            file=str(folder / "tokenizer.json"), end_of_document="[SEP]", begin_of_document="", padding="[UNK]"
        )
    )
    assert (plain.bos_id, plain.pieces[plain.pad_id]) == (-1, "[UNK]")
    several = write(tmp_path / "several", llama3()[0], {"generation_config.json": {"eos_token_id": [300, 301]}})
    with pytest.raises(ConfigError, match=r"names several tokens .*; set tokenizer\.end_of_document to the one that"):
        load_named(TokenizerConfig(file=str(several)))
    with pytest.raises(ConfigError, match=r"mixture\.fim needs them; leave mixture\.fim out"):
        load_named(TokenizerConfig(file=str(write(tmp_path / "gpt2", *gpt2()))), ["<|fim_prefix|>"])
    (tmp_path / "gpt2/tokenizer_config.json").write_text("[1]")
    with pytest.raises(
        ConfigError, match=r"tokenizer_config\.json holds list, not an object; restore it, or remove it"
    ):
        load_named(TokenizerConfig(file=str(tmp_path / "gpt2")))
    with pytest.raises(ConfigError, match=r"tokenizer\.file = 'nowhere' is no tokenizer"):
        load_named(TokenizerConfig(file="nowhere"))


def test_a_tokenizer_of_our_own_is_taken_too(tokenizer_folder: Path, tmp_path: Path) -> None:
    adopt(TokenizerConfig(file=str(tokenizer_folder)), tmp_path / "copy")
    own, copy = Tokenizer.load(tokenizer_folder), Tokenizer.load(tmp_path / "copy")
    assert copy.sha256 == own.sha256 and copy.special_ids == own.special_ids and not copy.foreign
    assert copy._parts is not None, "its batches are encoded as fast"
    with pytest.raises(ConfigError, match=r"was trained by Trivium, .*; leave out tokenizer\.end_of_document"):
        load_named(TokenizerConfig(file=str(tokenizer_folder), end_of_document="<pad>"))


def test_keys_of_training_are_refused_beside_a_file() -> None:
    with pytest.raises(ValueError, match=r"kind = .* is for training, .*; leave out kind, or tokenizer\.file"):
        TokenizerConfig(file="x", kind=TokenizerKind.UNIGRAM)
    with pytest.raises(ValueError, match=r"end_of_document = 'x' is for a tokenizer that was trained elsewhere; set"):
        TokenizerConfig(end_of_document="x")


@pytest.mark.parametrize("maker", [qwen, t5])
def test_a_data_run_takes_it(maker: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Makes rows by a foreign tokenizer: its own tokens end documents and fill rows, and its template is kept."""
    folder = write(tmp_path / "hub", *maker())
    lines = [{"text": f"Number {n}. " + TEXTS[n % 40][:200], "id": str(n)} for n in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"files": [str(tmp_path / "a.jsonl")], "format": "jsonl", "rules": {"any": "all"}}
    config = data_config(tmp_path / "data.toml", {"prose": source}, rules={"all": {}})
    tree = config.read_text().replace("vocab_size = 400", f'file = "{folder}"')
    config.write_text(tree)
    assert data_run([str(config)]) == 0, capsys.readouterr()
    run = tmp_path / "run"
    ours, plan = Tokenizer.load(run / "tokenizer"), Plan.open(run / "plan")
    assert ours.sha256 == Tokenizer.load(folder).sha256 and plan.pad_id == ours.pad_id
    told = json.loads((run / "tokenizer/tokenizer_config.json").read_text())
    assert told.get("chat_template") == ours.chat_template == (TEMPLATE if maker is qwen else None)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    (stores,) = [SourceStores.in_folder(run / "tokens/train/prose")]
    for store in stores.stores:
        for number in range(len(store)):
            ids = store.tokens(number)
            assert ids[-1] == ours.eos_id and ours.eos_id not in ids[:-1] and ours.bos_id not in ids
    texts = {line["text"] for line in lines}
    assert any(
        stores.stores[0].tokens(0)[:-1].tolist() == theirs.encode(t, add_special_tokens=False).ids for t in texts
    )
    row = plan.row(0)
    assert np.array_equal(row.labels[:-1][row.loss_mask[:-1]], row.tokens[1:][row.loss_mask[:-1]])
    assert data_run([str(config)]) == 0
    assert "tokenizer: " in (said := capsys.readouterr().out) and "done before, kept" in said
    file = folder / ("tokenizer_config.json" if maker is qwen else "config.json")
    file.write_text(
        file.read_text().replace("<|im_end|>", "<|endoftext|>").replace('"eos_token_id": 1', '"eos_token_id": 0')
    )
    assert data_run([str(config), "--dry-run"]) == 0
    assert re.search(r"tokenizer +would run", capsys.readouterr().out), "another end of a document, other tokens"


def test_two_tokenizers_are_told_apart_in_words(tmp_path: Path) -> None:
    first = write(tmp_path / "a", *gpt2())
    described = json.loads((first / "tokenizer.json").read_text())
    roles = json.loads((first / "tokenizer_config.json").read_text())
    vocab, merges = described["model"]["vocab"], described["model"]["merges"]
    piece = "".join(merges[-1])

    def told(config: dict[str, Any] = roles, vocab: dict[str, int] = vocab, **more: Any) -> str:
        model = described["model"] | {"vocab": vocab, "merges": merges[:-1] if piece not in vocab else merges}
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b/tokenizer.json").write_text(json.dumps(described | {"model": model} | more))
        (tmp_path / "b/tokenizer_config.json").write_text(json.dumps(config))
        return difference_of_files(first, tmp_path / "b")

    size, number = Tokenizer.load(first).vocab_size, vocab[piece]
    assert told(vocab=vocab | {"new": size}) == f"the first has {size} tokens and the second {size + 1}"
    renamed = {"new" if name == piece else name: one for name, one in vocab.items()}
    assert told(vocab=renamed) == f"token {number} is {piece!r} in the first and 'new' in the second"
    plain = [described["added_tokens"][0] | {"special": False}]
    assert told({}, added_tokens=plain) == "'<|endoftext|>' is a control symbol in one of them alone"
    assert told(roles | {"bos_token": "a"}) == "bos_token is '<|endoftext|>' in the first and 'a' in the second"
    assert told(normalizer={"type": "NFC"}).startswith("the same text becomes ")
    swapped = [*merges[1:], merges[0]]
    assert told(model=described["model"] | {"merges": swapped}).startswith("the same text becomes ")
    swapped = [*merges[:90], merges[91], merges[90], *merges[92:]]
    assert told(model=described["model"] | {"merges": swapped}).endswith("the same, and model.merges differs")
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoder = {"type": "Sequence", "decoders": [described["decoder"], strip]}
    assert told(decoder=decoder) == "their tokens are the same, and decoder differs"
    cut = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    assert told(truncation=cut, post_processor=None) == "", "texts are never cut or framed here"
    begun = "a document begins with nothing in the first and with '<|endoftext|>' in the second"
    assert told(roles | {"add_bos_token": True}) == begun
    assert "(dropout 0.1 of its model); set dropout to null" in told(model=described["model"] | {"dropout": 0.1})
    (tmp_path / "b/tokenizer.json").write_bytes((first / "tokenizer.json").read_bytes())
    for config, said in ((roles, ""), ({}, ""), (roles | {"eos_token": "a"}, "ends with '<|endoftext|>' in the first")):
        (tmp_path / "b/tokenizer_config.json").write_text(json.dumps(config))
        assert said in (found := difference_of_files(first, tmp_path / "b")) and bool(found) == bool(said)
    (tmp_path / "b/tokenizer_config.json").write_text(json.dumps(roles | {"add_bos_token": True}))
    (first / "tokenizer_config.json").unlink()
    assert difference_of_files(first, tmp_path / "b") == "", "no file says what begins a document in the first"
    assert difference_of_files(first, tmp_path / "b", strict=True) == begun
    (tmp_path / "b/tokenizer.json").write_text("{}")
    assert "b/tokenizer.json" in difference_of_files(first, tmp_path / "b")
