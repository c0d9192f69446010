"""Remedies in messages about tokenizers: each is followed, and the tokenizer is read or trained then."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from configs.loader import ConfigError, validate
from configs.tokenizer import TokenizerConfig
from data_pipeline.tokens import train_command
from data_pipeline.tokens.foreign import load_named
from data_pipeline.tokens.published import open_published
from data_pipeline.tokens.store import build
from data_pipeline.tokens.tokenizer import Tokenizer
from tests.foreign_tokenizers import bert, gpt2, llama3, write
from tests.shards import write_shard

SEVERAL = {"generation_config.json": {"eos_token_id": [300, 301]}}


def of(file: Path, **keys: str) -> TokenizerConfig:
    return TokenizerConfig(file=str(file), **keys)


def test_the_roles_of_tokens_are_named_as_the_messages_say(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Follows each message by its own examples, where it has some."""
    folder = write(tmp_path / "bert", *bert())
    for keys in ({}, {"end_of_document": "</s>"}):
        with pytest.raises(ConfigError, match=r"such as (\S+?)[, ]") as raised:
            load_named(of(folder, **keys))
        named = re.findall(r"'([^']+)'|(\[[A-Z]+\])", str(raised.value).split("such as")[1])
        assert named, raised.value
        end = next(filter(None, named[0]))
        assert load_named(of(folder, end_of_document=end)).eos_id >= 0
    several = write(tmp_path / "several", llama3()[0], SEVERAL)
    with pytest.raises(ConfigError, match=r"names several tokens that end a text, (.*); set tokenizer\.end") as raised:
        load_named(of(several))
    for token in re.findall(r"<\|[^>]+>", str(raised.value).split("a text, ")[1]):
        assert load_named(of(several, end_of_document=token)).eos_id >= 0
    with pytest.raises(ConfigError, match=r"leave out tokenizer\.end_of_document, tokenizer\.begin_of_document and"):
        load_named(of(tokenizer_folder, end_of_document="<pad>"))
    assert not load_named(of(tokenizer_folder)).foreign
    plain = write(tmp_path / "gpt2", *gpt2())
    with pytest.raises(ConfigError, match=r"leave mixture\.fim out, or name a tokenizer that has them"):
        load_named(of(plain), ["<|fim_prefix|>"])
    load_named(of(plain), [])


@pytest.mark.parametrize(
    ("damage", "words", "mend"),
    [
        (lambda folder: (folder / "tokenizer_config.json").write_text("[1]"), "restore it, or remove it", "roles"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "restore it, or remove it", "roles"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            "restore it, or train one with",
            "tokenizer.json",
        ),
        (lambda folder: shutil.rmtree(folder), "is no tokenizer, .*; name a folder with tokenizer.json or", "folder"),
    ],
)
def test_damaged_files_are_restored_or_removed(
    tmp_path: Path, damage: Callable[[Path], object], words: str, mend: str
) -> None:
    whole = write(tmp_path / "whole", *gpt2())
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(ConfigError, match=words):
        load_named(of(folder))
    if mend == "roles":
        (folder / "tokenizer_config.json").unlink()
        load_named(of(folder, end_of_document="<|endoftext|>"))
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    assert load_named(of(folder)).sha256 == load_named(of(whole)).sha256


def test_our_own_file_is_restored_too(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "copy"))
    for file, damaged, words in (
        ("tokenizer.model", b"nothing of the kind", "the file was changed or damaged; restore it, or train one"),
        (
            "info.json",
            b"[1]",
            r"info\.json is not a JSON object; restore it, or train one with `trivium tokenizer train`",
        ),
    ):
        (folder / file).write_bytes(damaged)
        with pytest.raises(ValueError, match=words):
            Tokenizer.load(folder)
        shutil.copy(tokenizer_folder / file, folder)
        Tokenizer.load(folder)
    (folder / "info.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"is not a sentencepiece model; restore it, or train one with `trivium tok"):
        Tokenizer.load(folder)
    shutil.copy(tokenizer_folder / "tokenizer.model", folder)
    Tokenizer.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(
        ValueError, match=r"does not exist; make it with `trivium data run` or `trivium tokenizer train`"
    ):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("wrong", "words", "right"),
    [
        ({"text": {"files": ["none/*.txt"]}}, r"matches no file", {}),
        ({"text": {"files": ["{dir}/a.txt"], "encoding": "klingon"}}, "is not a known encoding", {}),
        (
            {"text": {"files": ["{dir}/a.jsonl"], "text_key": "none"}},
            r"text\.text_key = 'none', but none of .*; the keys there are text; name the one that holds the text",
            {"text": {"files": ["{dir}/a.jsonl"], "text_key": "text"}},
        ),
        ({"text": {"files": ["{dir}/blank.jsonl"]}}, r"correct text\.text_key = 'text', or name other files", {}),
        (
            {"text": {"files": ["{dir}/empty.txt"]}},
            r"text.files: none of \d+ records in 1 files has text \(.*\); name other files",
            {},
        ),
        ({"text": {"run": "{dir}/none"}}, "name the run.dir of a data run", {"text": {"run": "{dir}/run"}}),
        ({"out": "{dir}/there"}, "exists already; name another folder", {"out": "{dir}/other"}),
        (
            {"tokenizer": {"vocab_size": 700, "reserved_tokens": 500}},
            "is too small",
            {"tokenizer": {"vocab_size": 1000, "reserved_tokens": 500}},
        ),
    ],
)
def test_a_tokenizer_is_trained_once_its_config_is_as_the_message_says(
    tmp_path: Path, wrong: dict[str, Any], words: str, right: dict[str, Any]
) -> None:
    lines = "".join(f"line {i} of a text that has some {i * 7919} words\n" for i in range(400))
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "there").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "' + lines.replace("\n", "\\n") + '"}\n')
    write_shard(tmp_path / "run/documents/train/a/00000.jsonl.zst", [{"text": lines, "id": "0", "metadata": {}}])
    base = {"out": "{dir}/out", "text": {"files": ["{dir}/a.txt"]}, "tokenizer": {"vocab_size": 330}}

    def train(changes: dict[str, Any]) -> int:
        config = tmp_path / "config.toml"
        config.write_text(tomli_w.dumps(base | changes).replace("{dir}", str(tmp_path)))
        return train_command.main([str(config)])

    with pytest.raises(ConfigError, match=words):
        train(wrong)
    if "too small" in words:
        validate(TokenizerConfig, right["tokenizer"])
        right = {"tokenizer": {"vocab_size": 330, "reserved_tokens": 10}}
    assert train(right) == 0


def test_a_tokenizer_that_cannot_be_measured_is_replaced_by_one_that_can(tmp_path: Path) -> None:
    folder = write(tmp_path / "gpt2", *gpt2())
    (tmp_path / "mine.tiktoken").write_bytes(b"IQ== 0\n")
    (tmp_path / "bad.model").write_bytes(b"nothing of the kind")
    for name, words in (
        ("none", "is no tokenizer that can be measured; name a folder or file of tokenizer.json"),
        ("mine.tiktoken", "name the model's tokenizer.json instead"),
        ("bad.model", "restore it, or|train one with"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_published(tmp_path / name)
    assert open_published(folder).encode(["a b"]) == open_published(folder / "tokenizer.json").encode(["a b"])


def test_a_store_is_written_once_the_tokenizer_has_the_end_that_the_message_asks_for(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.jsonl.zst", [{"text": "some words", "id": "0", "metadata": {}}])
    file = write(tmp_path / "bert", *bert())
    with pytest.raises(
        ValueError, match=r"no token that ends a document, and a store puts one .*; set (\S+)$"
    ) as raised:
        build(shard, tmp_path / "out", Tokenizer.load(file, complete=False))
    key = str(raised.value).rpartition(".")[2]
    build(shard, tmp_path / "out", load_named(of(file, **{key: "[SEP]"})))
