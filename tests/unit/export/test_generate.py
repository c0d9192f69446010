"""`trivium generate` and `trivium chat` on the command line, over an imported model."""

import io
import shutil

import pytest
import tomli_w

from configs.files import file_sha256
from configs.loader import ConfigError, plain
from export import chat, generate
from export.chat_codec import TextCodec
from export.tensors import write_tensors
from posttrain.chat_format import ChatFormat, jinja_template
from tests.unit.export.conftest import random_weights, tiny


@pytest.fixture
def model(tmp_path, tokenizer_path):
    config = tiny()
    write_tensors(tmp_path, random_weights(config).items(), max_bytes=10**9)
    facts = {"max_positions": 128, "tokenizer_sha256": file_sha256(tokenizer_path)}
    tree = {"model": plain(config), "import": facts}
    (tmp_path / "model.toml").write_text(tomli_w.dumps(tree))
    shutil.copyfile(tokenizer_path, tmp_path / "tokenizer.model")
    return tmp_path


def test_a_seed_fixes_what_is_written(model, capsys):
    def text(*more: str) -> str:
        assert generate.main([str(model), "--prompt", "It was", "--max-new-tokens", "12", *more]) == 0
        return capsys.readouterr().out

    assert text().startswith("It was")
    assert text("--seed", "7") == text("--seed", "7")
    assert text("--seed", "7") != text("--seed", "8")
    assert text("--temperature", "0", "--seed", "7") == text("--temperature", "0", "--seed", "8")


def test_several_prompts_are_continued_as_if_alone(model, capsys):
    common = ["--max-new-tokens", "12", "--temperature", "0"]
    generate.main([str(model), "--prompt", "春眠不觉晓，处处", *common])
    alone = capsys.readouterr().out.rstrip("\n")
    generate.main([str(model), "--prompt", "春眠不觉晓，处处", "--prompt", "It was the worst of", *common])
    assert capsys.readouterr().out.startswith(alone + "\n---")


def test_chat_keeps_the_dialogue(model, capsys, monkeypatch):
    (model / "chat_template.jinja").write_text(jinja_template())
    seen = []
    original = TextCodec.encode_chat
    monkeypatch.setattr(
        TextCodec,
        "encode_chat",
        lambda self, messages: seen.append(list(messages)) or original(self, messages),
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nand <|end|> again\n/reset\nanew\n/exit\nnot read\n"))
    assert chat.main([str(model), "--max-new-tokens", "4", "--system", "Be brief."]) == 0
    assert [[m["role"] for m in messages] for messages in seen] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert seen[2][1]["content"] == "anew"


def test_chat_prompt_is_that_of_training(model, tokenizer_path):
    codec = TextCodec(tokenizer_path, jinja_template())
    messages = [{"role": "user", "content": "of <|assistant|> wisdom\n"}]
    assert codec.encode_chat(messages) == ChatFormat(codec.tokenizer).render_prompt(messages)
    assert codec.stop_ids == [2, 7]


def test_texts_end_at_the_context(model, capsys):
    """The context is 128 tokens: a continuation is cut where it ends, and a prompt that fills it is refused."""
    codec = TextCodec(model / "tokenizer.model")
    long, short = "It was the age of wisdom, " * 9, "It was"
    room = 128 - len(codec.encode_prompt(long))
    assert 0 < room < 100

    def texts(*prompts: str, count: int) -> tuple[list[str], str]:
        argv = [word for prompt in prompts for word in ("--prompt", prompt)]
        generate.main([str(model), *argv, "--max-new-tokens", str(count), "--temperature", "0"])
        said = capsys.readouterr()
        return said.out.split("\n" + "-" * 40 + "\n"), said.err

    whole, said = texts(long, count=room)
    assert said == "", "it just fits"
    cut, said = texts(long, count=room + 1)
    assert cut == whole and said == (
        f"note: stopped after {room} of {room + 1} new tokens, at the end of the model's context of 128 tokens\n"
    )
    both, said = texts(long, short, count=room + 1)
    assert both[0] == whole[0].rstrip("\n") and said.count("note: ") == 1
    assert both[1] == texts(short, count=room + 1)[0][0].rstrip("\n")
    with pytest.raises(ConfigError, match=r"fill the model's context of 128 tokens; give a shorter one"):
        texts(short, long * 2, count=1)


def test_a_dialogue_ends_at_the_context(model, capsys, monkeypatch):
    (model / "chat_template.jinja").write_text(jinja_template())
    fills = "It was the age of wisdom, " * 20
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hello\n{fills}\nand\n/reset\nhello\n"))
    assert chat.main([str(model), "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr()
    assert said.err.count("fill the model's context of 128 tokens; start over with /reset") == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    chat.main([str(model), "--max-new-tokens", "4"])
    assert said.out.startswith(capsys.readouterr().out), "what is too long is not kept, and the dialogue goes on"
    monkeypatch.setattr("sys.stdin", io.StringIO("It was the age of wisdom, " * 14))
    chat.main([str(model), "--max-new-tokens", "4000"])
    assert "of 4000 new tokens, at the end of the model's context of 128" in capsys.readouterr().err


def test_mistakes_are_told_in_a_sentence(model, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        generate.main([str(tmp_path / "no"), "--prompt", "a"])
    with pytest.raises(ConfigError, match="has no checkpoints folder"):
        (tmp_path / "empty").mkdir()
        generate.main([str(tmp_path / "empty"), "--prompt", "a"])
    with pytest.raises(ConfigError, match=r"--temperature -1 is out of range; give 0"):
        generate.main([str(model), "--prompt", "a", "--temperature", "-1"])
    with pytest.raises(ConfigError, match="has no chat template"):
        chat.main([str(model)])
    (model / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"came with a tokenizer of SHA-256 .*tokenizer\.model is gone"):
        generate.main([str(model), "--prompt", "a"])
