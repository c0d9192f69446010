"""`trivium tokenizer report`: its numbers, the forms of tokenizers that it reads, and what it refuses."""

import base64
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

import cli
from configs.loader import ConfigError
from data_pipeline.core.shards import read_records
from data_pipeline.tokens.huggingface_tokenizer import byte_alphabet
from data_pipeline.tokens.published import open_published
from data_pipeline.tokens.report_command import main
from data_pipeline.tokens.tokenizer import Tokenizer
from tests.foreign_tokenizers import TEXTS, bert, gpt2, llama2, qwen, write

SOURCES = ("english", "chinese", "code")


@pytest.fixture(scope="module")
def run(documents: Path, tokenizer_folder: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data run's folder with documents, tokenizer and tokens."""
    folder = tmp_path_factory.mktemp("run")
    for name, made in (("documents", documents), ("tokenizer", tokenizer_folder), ("tokens", tokens)):
        (folder / name).symlink_to(made)
    return folder


def test_the_numbers_are_those_of_the_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write(tmp_path / "gpt2", *gpt2())
    out = tmp_path / "report.json"
    assert (
        main([str(run), "--against", str(other), "--against", f"b={write(tmp_path / 'x', *bert())}", "--out", str(out)])
        == 0
    )
    found = json.loads(out.read_text(encoding="utf-8"))
    texts = {
        source: [record["text"] for record in read_records(run / f"documents/heldout/{source}/00000.jsonl.zst")]
        for source in SOURCES
    }
    rows = {(row["source"], row["language"]): row for row in found["rows"]}
    own, theirs = Tokenizer.load(run / "tokenizer"), tokenizers.Tokenizer.from_file(str(other / "tokenizer.json"))
    whole = rows["all", "all"]
    assert whole["bytes"] == sum(len(text.encode()) for part in texts.values() for text in part)
    assert whole["documents"] == sum(map(len, texts.values()))
    for source, part in texts.items():
        (row,) = [row for (name, _), row in rows.items() if name == source]
        size = sum(len(text.encode()) for text in part)
        assert row["tokens"]["own"] == sum(len(own.encode(text)) for text in part)
        assert row["tokens"]["gpt2"] == sum(len(theirs.encode(text).ids) for text in part)
        assert row["bytes_per_token"]["gpt2"] == pytest.approx(size / row["tokens"]["gpt2"], abs=1e-4)
    used = {one for part in texts.values() for text in part for one in own.encode(text)}
    mine = found["tokenizers"]["own"]
    assert mine["unused"] == own.vocab_size - len(own.special_ids) - len(used)
    assert not {token["id"] for token in mine["unused_tokens"]} & used
    assert mine["unused_in_run"] < mine["unused"], "all tokens of the run use more of the vocabulary"
    longest = mine["longest"][0]
    assert longest["bytes"] == own.token_bytes.max() and longest["text"] == own.decode([longest["id"]])
    said = capsys.readouterr().out
    assert f"{own.vocab_size:,} tokens; not used by this text {mine['unused']:,}" in " ".join(said.split())
    assert "gpt2" in said and f"{rows['all', 'all']['bytes_per_token']['own']:.3f}" in said and "longest" in said


def test_every_published_form_gives_the_ids_of_its_library(tmp_path: Path) -> None:
    """Compares ids for GPT-2's files under both names, tiktoken's ranks, tokenizer.json and sentencepiece models."""
    made = gpt2()[0]
    described = json.loads(made.to_str())["model"]
    plain = {piece: number for piece, number in described["vocab"].items() if piece != "<|endoftext|>"}
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        folder = tmp_path / vocabulary
        folder.mkdir()
        (folder / vocabulary).write_text(json.dumps(plain), encoding="utf-8")
        lines = [" ".join(pair) for pair in described["merges"]]
        (folder / merges).write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
    alphabet = byte_alphabet()
    ranks = [(bytes(alphabet[one] for one in piece), number) for piece, number in plain.items()]
    lines = [f"{base64.b64encode(piece).decode()} {number}\n" for piece, number in ranks]
    (tmp_path / "gpt2.tiktoken").write_text("".join(lines))
    (tmp_path / "mine.tiktoken").write_text("".join(lines))
    texts = [*TEXTS[::5], "  two\n\n  spaces 2024 中文 don't"]
    expected = [found.ids for found in made.encode_batch(texts)]
    for path in ("vocab.json", "vocab.json/vocab.json", "encoder.json", "gpt2.tiktoken"):
        opened = open_published(tmp_path / path)
        assert opened.encode(texts) == expected, path
        assert opened.count(texts).sum() == sum(map(len, expected))
        assert opened.spellings[plain["Ġ"]] == " "
    vocabulary, merges = tmp_path / "vocab.json/vocab.json", tmp_path / "vocab.json/merges.txt"
    for file, damage in (
        (vocabulary, "["),
        (vocabulary, "[1]"),
        (vocabulary, '{"a": "b"}'),
        (merges, "a b c\n"),
        (merges, "no pair\n"),
    ):
        whole = file.read_text(encoding="utf-8")
        file.write_text(damage, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"merges.txt are not GPT-2's files .*; restore them, or name another"):
            open_published(vocabulary.parent)
        file.write_text(whole, encoding="utf-8")
        assert open_published(vocabulary.parent).encode(texts) == expected
    for maker in (llama2, qwen, bert):
        theirs = tokenizers.Tokenizer.from_file(str(write(tmp_path / maker.__name__, *maker()) / "tokenizer.json"))
        theirs.no_truncation()
        theirs.no_padding()
        wanted = [found.ids for found in theirs.encode_batch(texts, add_special_tokens=False)]
        assert open_published(tmp_path / maker.__name__).encode(texts) == wanted
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "any"),
        vocab_size=300,
        minloglevel=3,
        hard_vocab_limit=False,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "any.model"))
    assert open_published(tmp_path / "any.model").encode(texts) == model.encode(texts)
    with pytest.raises(ConfigError, match=r"mine\.tiktoken does not say how text is divided .*; name the model's"):
        open_published(tmp_path / "mine.tiktoken")


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer", "tokens"))
    cases = [
        (["none"], r"RUN = 'none': there is no document under none/documents/heldout; name the run\.dir of a data run"),
        ([str(run), "--against", "none"], r"none is no tokenizer that can be measured; name a folder or file of"),
        ([str(run), "--against", str(run / "tokenizer"), "--against", str(run / "tokenizer")], r"write NAME="),
        ([str(run), "--max-bytes", "0"], r"--max-bytes 0 leaves no text; give 1 or more"),
        ([str(run), "--out", str(tmp_path)], r"is a folder; name a file in it"),
        ([str(tmp_path / "copy")], r"tokenizer does not exist; name a tokenizer as --tokenizer PATH"),
    ]
    for arguments, said in cases:
        with pytest.raises(ConfigError, match=said):
            main(arguments)
    assert main([str(tmp_path / "copy"), "--tokenizer", str(run / "tokenizer"), "--max-bytes", "1"]) == 0
    found = json.loads((tmp_path / "copy/tokenizer_report.json").read_text(encoding="utf-8"))
    assert found["rows"][-1]["documents"] == 3, "one document of each source"
    assert "unused_in_run" not in found["tokenizers"]["own"]
    (tmp_path / "bare/documents").mkdir(parents=True)
    (tmp_path / "bare/documents/train").symlink_to(run / "documents/train")
    with pytest.raises(ConfigError, match=r"holds no document out, .*; set heldout\.share above 0, such as"):
        main([str(tmp_path / "bare"), "--tokenizer", str(run / "tokenizer")])


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["tokenizer", "report", "--help"])
    assert "--against gpt2=" in capsys.readouterr().out
