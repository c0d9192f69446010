"""`trivium generate` and `trivium chat` on the command line, over an imported model."""

import io
import json
import re
from collections.abc import Iterator

import pytest

from configs.loader import ConfigError
from configs.train import ParallelConfig
from export import chat, generate
from export.prompt_file import encode_prompts, read_lines
from export.text_model import TextModel, loaded
from posttrain.chat.chat_format import ChatFormat, jinja_template
from pretrain.generation.text_codec import TextCodec
from tests.tiny_models import ENGLISH, tiny, write_imported


@pytest.fixture
def model(tmp_path, tokenizer_path):
    return write_imported(tmp_path, tiny(), tokenizer_path)


@pytest.fixture
def chat_model(tmp_path, tokenizer_path):
    return write_imported(tmp_path, tiny(), tokenizer_path, jinja_template())


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


def test_a_prompts_text_depends_on_the_seed_and_not_on_its_batch(model, capsys, tmp_path):
    """Continues each of eight prompts alone, in two orders, and in batches of other sizes."""
    prompts = [ENGLISH[n : n + 3 * n + 1] for n in range(8)]

    def texts(prompts: list[str], *more: str) -> list[str]:
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        options = ["--max-new-tokens", "10", "--top-k", "50", "--min-p", "0.01", "--repetition-penalty", "1.1", *more]
        assert generate.main([str(model), "--prompts", str(file), *options]) == 0
        return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]

    whole = texts(prompts)
    assert len(set(whole)) == 8
    assert texts(prompts[::-1], "--batch-size", "3")[::-1] == whole
    assert [texts([prompt])[0] for prompt in prompts[:3]] == whole[:3]
    assert texts(prompts, "--seed", "7") != whole
    twice = texts([prompts[4], prompts[1], prompts[4]])
    assert twice[:2] == [whole[4], whole[1]] and twice[2] != twice[0], "the same prompt again gets another text"


def test_a_file_of_prompts_becomes_a_file_of_texts(chat_model, capsys, tmp_path):
    dialogue = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]
    lines = [{"id": 1, "prompt": "It was"}, {"messages": dialogue, "note": "é"}, {"prompt": ""}]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n".join(json.dumps(line) for line in lines))
    options = ["--max-new-tokens", "9", "--temperature", "0"]
    assert generate.main([str(chat_model), "--prompts", str(source), "--output", str(out), *options]) == 0
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert capsys.readouterr().out == "" and len(records) == 3
    for line, record in zip(lines, records, strict=True):
        assert record.items() >= line.items() and record.keys() - line.keys() == {"text", "tokens", "ending"}
        assert 1 <= record["tokens"] <= 9 and record["ending"] in ("length", "stop_token")
    generate.main([str(chat_model), "--prompt", "It was", *options])
    assert capsys.readouterr().out == "It was" + records[0]["text"] + "\n"
    answered = TextCodec(chat_model / "tokenizer.model", jinja_template()).encode_chat(dialogue)
    assert answered[-1] != 2 and records[1]["text"] != records[2]["text"]

    source.write_text(json.dumps({"prompt": "It was"}), encoding="utf-8-sig")  # some editors begin a file so
    generate.main([str(chat_model), "--prompts", str(source), "--max-new-tokens", "4000", "--temperature", "0"])
    assert json.loads(capsys.readouterr().out)["ending"] in ("context", "stop_token")


@pytest.fixture(scope="module")
def opened(tmp_path_factory, tokenizer_path) -> Iterator[TextModel]:
    folder = write_imported(tmp_path_factory.mktemp("opened"), tiny(), tokenizer_path)
    with loaded(str(folder), "latest", ParallelConfig(), "fp32") as found:
        yield found


@pytest.mark.parametrize(
    ("line", "said", "corrected"),
    [
        ("{", "line 2: not JSON", "{}"),
        ("[1]", r"line 2: not an object such as (\{.*?\})", None),
        ('{"text": "a"}', r"line 2: has the keys \['text'\], and needs either prompt or messages", '{"prompt": "a"}'),
        ('{"prompt": "a", "messages": []}', "needs either", '{"prompt": "a"}'),
        ('{"prompt": 3}', "prompt is int, not a text", '{"prompt": "3"}'),
        (
            '{"prompt": "a", "ending": 3}',
            "has the key 'ending', which is written for the continuation",
            '{"prompt": "a"}',
        ),
        ('{"prompt": "\\ud800"}', "half a surrogate pair", '{"prompt": "\\ud83d\\ude00"}'),
        (
            '{"prompt": "' + "It was the age of wisdom, " * 20 + '"}',
            "fill the model's context of 128 tokens",
            '{"prompt": "It was the age of wisdom, "}',
        ),
        ('{"messages": [{"role": "nobody", "content": "a"}]}', "messages is not a list of objects with role", ""),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has no chat template", '{"prompt": "a"}'),
    ],
)
def test_a_wrong_line_of_a_file_is_named_and_can_be_corrected_or_dropped(opened, tmp_path, line, said, corrected):
    """Follows what the message says: `corrected` is the line as it asks for it, None if the message has one itself."""
    file = tmp_path / "prompts.jsonl"

    def read(*lines: str) -> int:
        file.write_text("\n".join(lines) + "\n")
        return len(encode_prompts(file, read_lines(file), opened))

    with pytest.raises(ConfigError, match=rf"--prompts .*{said}.*; correct the line, or drop it") as raised:
        read('{"prompt": "It was"}', line)
    assert read('{"prompt": "It was"}') == 1
    if corrected is None:
        corrected = re.search(said, str(raised.value))[1]
    if corrected == "{}":  # JSON, and so the next fault is told
        with pytest.raises(ConfigError, match=r"has the keys \[\], and needs either prompt or messages"):
            read(corrected)
    else:
        assert read('{"prompt": "It was"}', corrected) == 1 + bool(corrected)


def test_a_file_without_prompts_is_told_what_a_line_looks_like(opened, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n \n")
    with pytest.raises(ConfigError, match=r"has no prompt; write lines such as (.*)$") as raised:
        encode_prompts(file, read_lines(file), opened)
    file.write_text(str(raised.value).split("such as ")[1])
    assert len(encode_prompts(file, read_lines(file), opened)) == 1
    for wrong, said in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file"),
        (file, "not UTF-8 at byte 0"),
    ):
        file.write_bytes(b"\xff")
        with pytest.raises(ConfigError, match=f"{said}.*; name a JSONL file with a prompt in each line"):
            read_lines(wrong)


def test_a_stop_string_ends_a_text_and_is_not_part_of_it(model, capsys):
    common = [str(model), "--prompt", "It was", "--max-new-tokens", "40", "--temperature", "0"]
    generate.main(common)
    whole = capsys.readouterr().out.removeprefix("It was").rstrip("\n")
    ids = TextCodec(model / "tokenizer.model").tokenizer.encode(whole)
    assert len(whole) > 20 and len(ids) > 10
    for first in (3, 7, 12):
        stop = whole[first : first + 4]
        generate.main([*common, "--stop", "never there", "--stop", stop])
        assert capsys.readouterr().out == "It was" + whole[: whole.index(stop)] + "\n"


class Writes(io.RawIOBase):
    """A file that keeps what each write wrote."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.written.append(bytes(data))
        return len(data)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_text_is_printed_as_it_comes(chat_model, capsys, monkeypatch, command):
    module, more = (generate, ["--prompt", "春眠"]) if command == "generate" else (chat, [])
    argv = [str(chat_model), *more, "--max-new-tokens", "40", "--temperature", "2", "--top-p", "0.98"]

    def run(file) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("sys.stdin", io.StringIO("春眠\n"))
            patched.setattr("sys.stdout", file)
            assert module.main(argv) == 0
            file.flush()

    writes, together = Writes(), io.StringIO()
    run(io.TextIOWrapper(io.BufferedWriter(writes), encoding="utf-8", write_through=True))
    run(together)
    assert b"".join(writes.written).decode() == together.getvalue()
    pieces = [data.decode() for data in writes.written]  # fails at half a character
    assert len(pieces) > 10 and "\ufffd" not in pieces[0]


def test_chat_keeps_the_dialogue(chat_model, capsys, monkeypatch):
    seen = []
    original = TextCodec.encode_chat
    monkeypatch.setattr(
        TextCodec,
        "encode_chat",
        lambda self, messages: seen.append(list(messages)) or original(self, messages),
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nand <|end|> again\n/reset\nanew\n/exit\nnot read\n"))
    assert chat.main([str(chat_model), "--max-new-tokens", "4", "--system", "Be brief."]) == 0
    assert [[m["role"] for m in messages] for messages in seen] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert seen[2][1]["content"] == "anew"


def test_a_dialogue_that_the_template_refuses_is_answered_by_what_would_help(chat_model, capsys, monkeypatch):
    """Runs a template that wants a system message, and one that takes none; each is content once told."""
    original, wanted = TextCodec.encode_chat, True

    def encode_chat(self, messages):
        if (messages[0]["role"] == "system") != wanted:
            raise ValueError("no such dialogue")
        return original(self, messages)

    monkeypatch.setattr(TextCodec, "encode_chat", encode_chat)
    remedies = {True: "give a system message by --system", False: "leave out --system"}
    for wanted, remedy in remedies.items():
        for given in (not wanted, wanted):
            monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
            options = ["--system", "Be brief."] if given else []
            assert chat.main([str(chat_model), "--max-new-tokens", "2", *options]) == 0
            said = f"the chat template refuses the dialogue: no such dialogue; start over with /reset, or {remedy}\n"
            assert (said in capsys.readouterr().err) == (given != wanted)


def test_chat_prompt_is_that_of_training(model, tokenizer_path):
    codec = TextCodec(tokenizer_path, jinja_template())
    messages = [{"role": "user", "content": "of <|assistant|> wisdom\n"}]
    assert codec.encode_chat(messages) == ChatFormat(codec.tokenizer).render_prompt(messages)
    assert codec.stop_ids == [2, 7]


def test_texts_end_at_the_context(model, capsys, monkeypatch):
    """Fills a context of 128 tokens: a continuation is cut at its end, and a prompt that fills it is refused."""
    monkeypatch.setattr(TextCodec, "stop_ids", [])  # whose texts end earlier depends on how torch was built
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


def test_a_dialogue_ends_at_the_context(chat_model, capsys, monkeypatch):
    fills = "It was the age of wisdom, " * 20
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hello\n{fills}\nand\n/reset\nhello\n"))
    assert chat.main([str(chat_model), "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr()
    assert said.err.count("fill the model's context of 128 tokens; start over with /reset") == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    chat.main([str(chat_model), "--max-new-tokens", "4"])
    assert said.out.startswith(capsys.readouterr().out), "what is too long is not kept, and the dialogue goes on"
    monkeypatch.setattr("sys.stdin", io.StringIO("It was the age of wisdom, " * 14))
    chat.main([str(chat_model), "--max-new-tokens", "4000"])
    assert "of 4000 new tokens, at the end of the model's context of 128" in capsys.readouterr().err


def test_mistakes_are_told_in_a_sentence(model, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        generate.main([str(tmp_path / "no"), "--prompt", "a"])
    with pytest.raises(ConfigError, match="has no checkpoints folder"):
        (tmp_path / "empty").mkdir()
        generate.main([str(tmp_path / "empty"), "--prompt", "a"])
    with pytest.raises(ConfigError, match=r"--temperature -1 is out of range; give 0"):
        generate.main([str(model), "--prompt", "a", "--temperature", "-1"])
    for option, value in (("--top-p", "0"), ("--min-p", "1.5"), ("--top-k", "-1"), ("--repetition-penalty", "0")):
        for command, more in ((generate, ["--prompt", "a"]), (chat, [])):
            with pytest.raises(ConfigError, match=rf"^{option} {value} is out of range; give "):
                command.main([str(model), *more, option, value])
    with pytest.raises(ConfigError, match=r"--stop '' is found everywhere"):
        chat.main([str(model), "--stop", ""])
    with pytest.raises(ConfigError, match=r"--batch-size 0 is less than 1"):
        generate.main([str(model), "--prompt", "a", "--batch-size", "0"])
    with pytest.raises(ConfigError, match=r"--output is for the texts of --prompts"):
        generate.main([str(model), "--prompt", "a", "--output", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match=r"--output .* is a folder; name a file in it"):
        generate.main([str(model), "--prompts", str(tmp_path / "no.jsonl"), "--output", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"no\.jsonl: No such file or directory; name a JSONL file"):
        generate.main([str(model), "--prompts", str(tmp_path / "no.jsonl")])
    with pytest.raises(ConfigError, match=r"parallel\.pp = 2 is for training; .* leave the key out"):
        generate.main([str(model), "--prompt", "a", "parallel.pp=2"])
    with pytest.raises(ConfigError, match=r"over 2 ranks, and this is one process; start `torchrun --nproc-per-node 2"):
        generate.main([str(model), "--prompt", "a", "parallel.tp=2"])
    with pytest.raises(ConfigError, match=r"--prompt 'a\\udcff'\.\.\. is not valid Unicode; give it in UTF-8"):
        generate.main([str(model), "--prompt", "a\udcff"])
    with pytest.raises(ConfigError, match="has no chat template"):
        chat.main([str(model)])
    (model / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.model, with which the model was trained, is missing"):
        generate.main([str(model), "--prompt", "a"])


def test_answers_are_asked_for_with_or_without_reasoning_where_the_template_knows_of_both(chat_model, tmp_path):
    tokenizer, dialogue = chat_model / "tokenizer.model", [{"role": "user", "content": "hello"}]
    bare = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}<|assistant|>"
    with pytest.raises(ConfigError, match=r"--no-think: the model's chat template does not use enable_thinking"):
        TextCodec(tokenizer, bare).check_thinking(False)
    codec = TextCodec(
        tokenizer,
        "{% for m in messages %}{{ '<|user|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% if enable_thinking is false %}{{ 'no ' }}{% endif %}"
        "{% endif %}",
    )
    thought = codec.encode_chat(dialogue)
    codec.check_thinking(False)
    silent = codec.encode_chat(dialogue)
    assert silent[: len(thought)] == thought and codec.tokenizer.decode(silent[len(thought) :]).strip() == "no"
    codec.check_thinking(True)
    assert codec.encode_chat(dialogue) == thought
