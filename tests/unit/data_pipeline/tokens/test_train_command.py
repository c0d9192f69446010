"""`trivium tokenizer train`: its texts, the vocabulary that was asked for, and what it refuses."""

import argparse
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from configs.loader import ConfigError
from configs.tokenizer import TokenizerConfig, TokenizerKind
from data_pipeline.tokens.foreign import load_named
from data_pipeline.tokens.tokenizer import SPECIALS, Tokenizer
from data_pipeline.tokens.tokenizer_training import train
from data_pipeline.tokens.train_command import main

CODE = Path(argparse.__file__).read_text(encoding="utf-8")
LONGEST = 12  # run of white space


def write_config(folder: Path, text: dict[str, Any], **tokenizer: Any) -> Path:
    """Writes a config to `folder` that trains on `text` and writes to its folder "out"."""
    path = folder / "tokenizer.toml"
    tree = {"out": str(folder / "out"), "text": text, "tokenizer": {"vocab_size": 700, **tokenizer}}
    path.write_text(tomli_w.dumps(tree), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", list(TokenizerKind))
def test_the_vocabulary_is_what_was_asked_for(kind: TokenizerKind, tmp_path: Path) -> None:
    """Trains each kind: special and reserved tokens have ids that text never becomes, and digits are single."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/code.txt").write_text(CODE[:60_000], encoding="utf-8")
    runs = LONGEST if kind != TokenizerKind.WORDPIECE else 0
    config = write_config(
        tmp_path,
        {"files": [str(tmp_path / "texts")]},
        kind=kind.value,
        special_tokens=["<|tool|>", "<|fim_prefix|>"],
        reserved_tokens=2,
        vocab_multiple=64,
        whitespace_runs=runs,
    )
    assert main([str(config)]) == 0
    made = Tokenizer.load(tmp_path / "out")
    named = [*SPECIALS, "<|tool|>", "<|fim_prefix|>", "<|reserved_0|>", "<|reserved_1|>"]
    filled = {f"<|reserved_{number}|>": 698 + number for number in range(2, 6)}
    assert made.special_ids == dict(zip(named, range(12), strict=True)) | filled
    assert made.vocab_size == len(set(made.pieces)) == 704 and made.vocab_size % 64 == 0
    for name in made.special_ids:
        assert not set(made.encode(f"a {name} b{name}")) & {*range(1, 12), *range(700, 704)}
    assert len(made.encode("2048")) == 4
    for one in " \t":
        for size in range(1, runs + 1):
            assert len(made.encode(one * size)) == 1 and len(made.encode(f"x{one * size}")) == 2, (one, size)
    text = "\t\tif x:\n" + " " * 30 + "y = 7  # \u2581 \ud7ff\n"
    assert not made.lossless or made.decode(made.encode(text)) == text


def test_a_run_s_documents_give_the_tokenizer_of_the_run(documents: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/documents").symlink_to(documents)
    config = write_config(tmp_path, {"run": str(tmp_path / "run")}, train_bytes=60_000, vocab_size=1500)
    assert main([str(config)]) == 0
    settings = TokenizerConfig(vocab_size=1500, train_bytes=60_000)
    own = train(sorted(documents.glob("train/*/*.zst")), tmp_path / "own", settings)
    assert Tokenizer.load(tmp_path / "out").sha256 == own["sha256"]


def test_files_of_several_formats_are_read_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trains on files of several formats; records without text are counted, and `--dry-run` writes nothing."""
    lines = [{"body": {"text": part}} for part in re.findall(r"(?s).{1,800}", CODE[:30_000])] + [{"body": 3}]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "b.py").write_text("zyzzyva = 1\n" * 400, encoding="utf-8")
    text = {"files": [str(tmp_path / "a.jsonl*"), str(tmp_path / "b.py")], "text_key": "body.text"}
    config = write_config(tmp_path, text)
    assert main([str(config), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert (
        " of them control symbols" in said
        and " bytes of text from 2 files (" in said
        and not (tmp_path / "out").exists()
    )
    assert main([str(config)]) == 0
    said = capsys.readouterr().out
    assert "1 records had no text" in said and "tokenizer.file=" in said
    assert len(Tokenizer.load(tmp_path / "out").encode("zyzzyva")) == 1
    with pytest.raises(ConfigError, match=r"out = '.*' exists already; name another folder, or remove it"):
        main([str(config)])
    with pytest.raises(
        ConfigError, match=r"text\.text_key = 'none', but none of the first 39 records .*body\.text, body"
    ):
        main([str(config), f"out={tmp_path / 'other'}", "text.text_key=none", f"text.files=['{tmp_path}/a.jsonl.gz']"])
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["text.files=[]"], r"text: it names no text; set text\.files, or text\.run"),
        (["text.files=['none/*.txt']"], r"text\.files: 'none/\*\.txt' matches no file"),
        (["text.run=none"], r"text\.run = 'none': there is no document under none/documents/train"),
        (["text.encoding=klingon"], r"text\.encoding = 'klingon' is not a known encoding"),
        (["tokenizer.kind=wordpiece", "tokenizer.whitespace_runs=4"], r"whitespace_runs = 4: WordPiece keeps no white"),
        (["tokenizer.special_tokens=['<s>']"], r"special_tokens: '<s>' is a token that every tokenizer has"),
        (["tokenizer.special_tokens=['a b']"], r"special_tokens: 'a b' cannot be a control symbol; use two characters"),
        (["tokenizer.special_tokens=['<x>', '<x>']"], r"special_tokens: '<x>' stands there twice; leave one out"),
        (["tokenizer.reserved_tokens=500"], r"vocab_size = 700 is too small: 508 control symbols"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: list[str], said: str) -> None:
    (tmp_path / "a.txt").write_text(CODE[:5000], encoding="utf-8")
    config = write_config(tmp_path, {"files": [str(tmp_path / "a.txt")]})
    with pytest.raises(ConfigError, match=said):
        main([str(config), *changes])


@pytest.mark.parametrize("kind", [kind for kind in TokenizerKind if kind != TokenizerKind.WORDPIECE])
def test_a_vocabulary_without_room_for_runs_says_how_many_it_needs(
    kind: TokenizerKind, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(CODE[:20_000], encoding="utf-8")
    config = write_config(tmp_path, {"files": [str(tmp_path / "a.txt")]}, kind=kind.value, whitespace_runs=60)
    assert main([str(config), "tokenizer.vocab_size=360"]) == 1
    remedy = re.search(r"raise tokenizer\.vocab_size to (\d+), or lower", capsys.readouterr().err)
    assert remedy and not (tmp_path / "out").exists()
    assert main([str(config), f"tokenizer.vocab_size={remedy[1]}"]) == 0
    said = re.search(r"8 are control symbols; a data run takes it as tokenizer\.file=(\S+)", capsys.readouterr().out)
    assert said and load_named(TokenizerConfig(file=said[1])).vocab_size == int(remedy[1])
    assert len(Tokenizer.load(tmp_path / "out").encode(" " * 60)) == 1
