"""The loss mask made visible: `trivium sft --show`, the run's report, and masks that would teach no end of a turn."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.loader import ConfigError, toml
from configs.sealed import CHECKPOINT
from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain import sft
from posttrain.chat import mask_xray
from posttrain.chat.chat_format import ChatFormat
from posttrain.chat.dialogues import Example, read_dialogues
from posttrain.chat.sft_data import SFTSource
from posttrain.chat.template_format import TemplateFormat
from posttrain.records import Records
from pretrain.checkpoint.lineage import Lineage
from pretrain.report import run_report
from tests.chat_templates import QWEN3
from tests.chat_templates import write as write_tokenizer

EVIL = "\x1b[31m <script>alert(1)</script> & 你好"
MODEL = {
    "vocab_size": 400,
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_heads": 4,
    "num_kv_heads": 4,
}


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


RECORDS = [
    {"id": "first", "messages": talk("how are you?", "fine, thank you")},
    {"messages": talk("hello", EVIL, "what is your name?", "Ishmael")},
    {"messages": talk("nobody answers")},
    {"messages": talk("name?", "end")},
]


def write_run(run: Path, lineage: Lineage) -> None:
    """Writes a run with a checkpoint without weights, whose model has a tokenizer and perhaps a template of its own."""
    checkpoint = run / "checkpoints/step_1"
    checkpoint.mkdir(parents=True)
    facts = {"step": 1, "files": {}, "config": {"model": MODEL}, "identity": lineage.identity, "context": 64}
    (checkpoint / "manifest.json").write_bytes(CHECKPOINT.write(facts))
    lineage.keep(run, lineage.identity)


@pytest.fixture
def base(tokenizer_file: Path, tmp_path: Path) -> Path:
    """Folder with dialogues, a run without weights, and a config."""
    write_run(tmp_path / "init", Lineage(tokenizer_file))
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "init": {"run": str(tmp_path / "init")},
        "data": {"dialogues": [str(tmp_path / "d.jsonl")], "heldout_share": 0.0, "max_bad_share": 0.5},
        "train": {"steps": 1, "global_batch_size": 4, "micro_batch_size": 2, "seq_length": 128},
        "optimizer": {"lr": 0.001},
    }
    (tmp_path / "sft.toml").write_bytes(toml(tree))
    return tmp_path


def test_the_command_shows_samples_with_their_masks_and_trains_nothing(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft.main([str(base / "sft.toml"), "--show", "9", "parallel.tp=4"]) == 0
    said = capsys.readouterr().out
    assert f"dialogues: {base}/d.jsonl:1 (id first)\n" in said and f"dialogues: {base}/d.jsonl:4\n" in said
    assert "<s><|user|>how are you?<|end|><|assistant|>{+fine, thank you<|end|>+}\n" in said
    assert "the end of the turn is trained in 2 of 2 answers; stable" in said
    assert r"{+\x1b[31m <script>" in said and "\x1b" not in said  # data cannot control the terminal
    counts = re.search(r"dialogues: 3 samples, (\d+) tokens, (\d+) of them trained \((.+)%\); 0 unstable", said)
    assert counts and int(counts[2]) / int(counts[1]) == pytest.approx(float(counts[3]) / 100, abs=1e-3)
    assert f"set aside: 1 no_assistant_turn (first: {base}/d.jsonl:3)" in said
    assert not (base / "run").exists()
    for wrong in ("0", "-1", "all"):
        with pytest.raises(ConfigError, match=f"--show {wrong} is no number of samples"):
            sft.main([str(base / "sft.toml"), f"--show={wrong}"])


def test_refused_data_are_shown_too(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(base / "sft.toml"), "--show", "2", "data.max_bad_share=0.1"]
    with pytest.raises(ConfigError, match=r"1 of 4 dialogues were set aside, more than data\.max_bad_share = 0\.1"):
        sft.main(argv)
    assert "{+fine, thank you<|end|>+}" in capsys.readouterr().out


FORMAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ '<|end|>' }}{% endgeneration %}{% else %}{{ m.content }}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GENERATION, END = "{% generation %}", "{% endgeneration %}"
UNTAUGHT = {
    "no end": (FORMAT.replace("{{ '<|end|>' }}", "\n"), "writes no control token after an answer", "{+fine, thank you"),
    "end left out": (
        FORMAT.replace("{{ '<|end|>' }}" + END, END + "{{ '<|end|>' }}"),
        "writes '<|end|>' at the end of an answer, behind {% endgeneration %}",
        "{+fine, thank you+}<|end|>",
    ),
    "all zero": (
        FORMAT.replace(GENERATION, GENERATION + END).replace("'<|end|>' }}" + END, "'<|end|>' }}"),
        "the loss mask is all zero",
        "<|assistant|>fine, thank you<|end|>",
    ),
    "all ones": (
        GENERATION + FORMAT.replace(GENERATION, "").replace(END, "") + END,
        "the loss mask is all ones",
        "{+<|user|>how are you?<|end|><|assistant|>fine, thank you<|end|>+}",
    ),
}


@pytest.mark.parametrize("name", UNTAUGHT)
def test_a_mask_that_teaches_no_end_is_refused_by_line_and_its_remedy_works(
    base: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    template, said, shown = UNTAUGHT[name]
    (base / "own.jinja").write_text(template)
    argv = [str(base / "sft.toml"), f"data.chat_template={base}/own.jinja", "train.micro_batch_size=1"]
    with pytest.raises(ConfigError) as raised:
        sft.main([*argv, "--dry-run"])
    message = str(raised.value)
    assert message.startswith(f"data.dialogues: {base}/d.jsonl:1: ") and said in message
    assert message.endswith(f" in {base}/own.jinja")
    capsys.readouterr()
    with pytest.raises(ConfigError, match=re.escape(message)):
        sft.main([*argv, "--show", "1"])
    printed = capsys.readouterr().out
    assert f"{base}/d.jsonl:1" in printed and shown in printed
    # The model's own template cannot be changed: a copy can.
    write_run(base / "own", Lineage(tokenizer_file, template))
    with pytest.raises(ConfigError, match=r"in a copy of the model's chat template, and name its file as data\.chat_t"):
        sft.main([argv[0], f"init.run={base}/own", "--dry-run"])
    (base / "own.jinja").write_text(FORMAT)
    assert sft.main([*argv, "--dry-run"]) == 0


def test_what_is_shown_is_what_is_trained(tmp_path: Path) -> None:
    """Compares every token of every sample, also of an unstable template and of characters of several tokens."""
    chat = TemplateFormat(Tokenizer.load(write_tokenizer(tmp_path / "tokenizer", QWEN3)), QWEN3)
    messages = talk("a", "é 😀", "b", "春眠")
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": messages}))
    found = read_dialogues([str(tmp_path / "d.jsonl")], chat, 256, 0.0, 0.0)
    assert len(found.train) == 2
    masks = mask_xray.describe({"dialogues": found}, chat, 5)
    assert masks["sources"]["dialogues"]["unstable"] == 2
    assert "<think>" in masks["sources"]["dialogues"]["first_unstable"]
    for upto, example, sample in zip((2, 4), found.train, masks["samples"], strict=True):
        assert [weight for _, weight in sample["pieces"]] == example.answer.tolist()
        assert "".join(text for text, _ in sample["pieces"]) == chat.encoder.text(messages[:upto])[0]
        assert "unstable: after" in sample["facts"] and "trained in 1 of 1 answers" in sample["facts"]
    coloured = mask_xray.printed(masks, colours=True)
    assert "\x1b[30;42m" in coloured and "what is trained is green" in coloured
    plain = mask_xray.printed(masks, colours=False)
    assert "{+<think>\n\n</think>\n\né 😀<|im_end|>+}" in plain and "\x1b" not in plain
    assert "what is trained is between {+ and +}" in plain


def test_an_unstable_sample_is_among_the_shown_ones() -> None:
    calm = [Example(str(i), np.arange(3), np.array([False, True, True])) for i in range(50)]
    odd = Example("odd", np.arange(3), np.array([False, True, True]), "d:9", "after 'a' there is 'b'")
    shown = mask_xray._spread(Records("dialogues", [*calm[:33], odd, *calm[33:]]), 3)
    assert len(shown) == 3 and odd in shown


def test_a_run_keeps_its_masks_for_its_report(chat: ChatFormat, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    found = {"dialogues": read_dialogues([str(tmp_path / "d.jsonl")], chat, 128, 0.0, 1.0)}
    source = SFTSource(found, 128, chat.ids["<pad>"], 1, mask_xray.describe(found, chat, 6))
    run = tmp_path / "run"
    run.mkdir()
    source.note_use(run)
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 9, "loss": 1.0}\n')
    page = run_report.write(run).read_text()
    assert "<h2>What is trained</h2>" in page and "1 no_assistant_turn (first: " in page
    assert "&lt;script&gt;" in re.sub("</?b>", "", page) and "<script" not in page and "\x1b" not in page
    words = re.findall(r"<b>([^<]*)</b>", page.partition("d.jsonl:1")[2].partition("d.jsonl:2")[0])
    assert "".join(words) == "fine, thank you&lt;|end|&gt;"
    broken: list[Any] = [{"sources": {}}, {"sources": {"a": 3}, "samples": []}, [], "x"]
    for content in (*map(json.dumps, broken), "{"):
        (run / "loss_mask.json").write_text(content)
        assert "Warning: loss_mask.json cannot be read" in run_report.write(run).read_text()
