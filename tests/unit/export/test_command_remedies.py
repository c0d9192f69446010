"""Remedies in messages of generate, export and import: each is done word for word, and the command goes on then."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from configs.loader import ConfigError
from configs.mixture import PlanConfig
from configs.model_parts import AttentionConfig
from configs.moe import MoEConfig
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.tokens.store import build
from data_pipeline.tokens.tokenizer import Tokenizer
from export import generate, huggingface, import_hf
from export.publishing import RECORD
from tests.shards import write_shard
from tests.tiny_models import ENGLISH, tiny, write_imported

EXPORT = """
run = "run"
out = "out"
prompts = ["It was"]
chat_prompts = ["a"]
sample_tokens = 2
[verify]
greedy_tokens = 2
max_tokens = 8
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path, exported: Path) -> Path:
    """Folder with an imported model, a Hugging Face folder, a file of prompts, and the config of an export."""
    folder = tmp_path_factory.mktemp("made")
    write_imported(folder / "run", tiny(), tokenizer_path)
    dense_first = MoEConfig(num_experts=4, top_k=2, dense_layers=(0,))
    moe = tiny(moe=True).model_copy(update={"moe": dense_first, "attention": AttentionConfig(qk_norm="head")})
    write_imported(folder / "experts", moe, tokenizer_path)
    shutil.copytree(exported, folder / "hf")
    for name, content in (("cut", "{"), ("list", "[]")):
        shutil.copytree(exported, folder / name)
        (folder / name / "config.json").write_text(content)
        (folder / name / RECORD).unlink()
    (folder / "taken").mkdir()
    for name, text in (
        ("taken/notes.txt", "mine"),
        ("prompts.jsonl", '{"prompt": "It was"}\n'),
        ("empty.jsonl", "\n"),
        ("export.toml", EXPORT),
    ):
        (folder / name).write_text(text)
    return folder


A, FILE = ["--prompt", "a"], ["--prompts", "prompts.jsonl"]


@pytest.mark.parametrize(
    ("command", "refused", "said", "right"),
    [
        (generate, ["run/checkpoints", *A], "name the run, run, or one of them", ["run", *A]),
        (generate, ["run/checkpoints", *A], "or one of them", ["run/checkpoints/step_0", *A]),
        (generate, ["run", *A, "--step", "9"], "[0]: give one of them", ["run", *A, "--step", "0"]),
        (generate, ["run", *A, "--step", "9"], "leave it out for the newest", ["run", *A]),
        (
            generate,
            ["run", *A, "--batch-size", "0"],
            "is less than 1; give 1 or more",
            ["run", *A, "--batch-size", "1"],
        ),
        (generate, ["run", *A, "--top-p", "0"], "at most 1", ["run", *A, "--top-p", "1"]),
        (generate, ["run", *A, "--top-k", "-1"], "or 0 to keep all", ["run", *A, "--top-k", "0"]),
        (generate, ["run", *A, "--min-p", "1.5"], "a share from 0", ["run", *A, "--min-p", "0"]),
        (generate, ["run", *A, "--temperature", "-1"], "give 0", ["run", *A, "--temperature", "0"]),
        (generate, ["run", *A, "--repetition-penalty", "0"], "1.1", ["run", *A, "--repetition-penalty", "1.1"]),
        (generate, ["run", *A, "--stop", ""], "give a text", ["run", *A, "--stop", "x"]),
        (generate, ["run", *A, "parallel.pp=2"], "leave the key out", ["run", *A]),
        (generate, ["run", *FILE, "--output", "taken"], "name a file in it", ["run", *FILE, "--output", "taken/o"]),
        (generate, ["run", *FILE, "--output", FILE[1]], "would replace; name another", ["run", *FILE, "--output", "o"]),
        (generate, ["run", "--prompts", "empty.jsonl"], '{"prompt": "It was"}', ["run", *FILE]),
        (generate, ["run", "--prompt", "word " * 200], "give a shorter one", ["run", "--prompt", "word"]),
        (huggingface, ["export.toml", "out=taken"], "choose another folder", ["export.toml", "out=another"]),
        (huggingface, ["export.toml", "adapter=peft"], "set adapter=merge", ["export.toml", "adapter=merge"]),
        (huggingface, ["export.toml", "base=run"], "or leave base out", ["export.toml"]),
        (
            huggingface,
            ["export.toml", "run=experts", "verify.layers=1"],
            "leaves out every layer with experts, of which layer 1 is the first; set verify.layers=2 or more",
            ["export.toml", "run=experts", "verify.layers=2"],
        ),
        (import_hf, ["cut", "new"], "cut/config.json is not valid JSON (", ["hf", "new"]),
        (import_hf, ["list", "new"], "list/config.json holds no JSON object; fetch it again", ["hf", "new"]),
        (import_hf, ["hf", "taken"], "name a new folder", ["hf", "new"]),
        (import_hf, ["hf", "new", "--base", "run"], "leave them out", ["hf", "new"]),
        (import_hf, ["hf", "new", "--config", "x"], "has a config.json of its own; leave --config out", ["hf", "new"]),
        (
            import_hf,
            ["hf", "new", "--max-shard-gb", "0"],
            "holds no weight; give a size above 0, such as 5",
            ["hf", "new", "--max-shard-gb", "5"],
        ),
        (import_hf, ["prompts.jsonl", "new"], "is a file; name a Hugging Face model directory", ["hf", "new"]),
        (import_hf, ["gone", "new"], "gone does not exist; name a Hugging Face model directory", ["hf", "new"]),
        (import_hf, ["run", "new"], "needs no import; train from it with init.run=run", []),
        (import_hf, ["run/checkpoints/step_0", "new"], "with init.checkpoint=run/checkpoints/step_0", []),
    ],
)
def test_a_command_goes_on_once_its_message_was_followed(
    command: ModuleType, refused: list[str], said: str, right: list[str], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    more = {generate: ["--max-new-tokens", "2"]}.get(command, ["--dry-run"])
    with pytest.raises(ConfigError) as raised:
        command.main([*refused, *more])
    assert said in str(raised.value)
    if right:
        assert command.main([*right, *more]) == 0


def test_a_model_or_prompts_that_are_not_there_are_told_without_torch(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/step_4").mkdir(parents=True)
    run, none = str(tmp_path / "run"), str(tmp_path / "none")
    asked = [
        ("generate", [none, "--prompt", "a"], "does not exist; name a run"),
        ("generate", [run, "--prompts", none], "No such file or directory; name a JSONL file"),
        ("generate", [run, "--step", "5", "--prompt", "a"], "saved steps are [4]"),
        ("chat", [none], "does not exist; name a run"),
        ("evaluate", [run, "--step", "5"], "saved steps are [4]"),
        ("huggingface", ["configs/export/demo.toml", f"run={none}"], "does not exist; name a run"),
    ]
    script = (
        "import importlib, json, sys\nfrom configs.loader import ConfigError\n"
        "for module, argv, words in json.loads(sys.argv[1]):\n"
        "    try: importlib.import_module(f'export.{module}').main(argv)\n"
        "    except ConfigError as error: assert words in str(error), error\n"
        "    else: sys.exit(f'{argv} was not refused')\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, json.dumps(asked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_export_compares_held_out_text_once_a_plan_is_named_as_the_note_says(
    made: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(made)
    tokenizer = Tokenizer.load(tokenizer_path.parent)
    for split in ("train", "heldout"):
        shard = write_shard(tmp_path / f"{split}.jsonl.zst", [{"text": ENGLISH, "id": split, "metadata": {}}])
        build(shard, tmp_path / "tokens" / split / "prose/00000", tokenizer)
    mixture = PlanConfig(seq_length=32, samples=2, weights={"prose": 1.0})
    build_plan(tmp_path / "tokens", tokenizer_path.parent, tmp_path / "plan", mixture)
    note = "logits are compared on the prompts alone, not on held-out text; plan=FOLDER names a data plan"
    for more, is_noted in (([], True), ([f"plan={tmp_path / 'plan'}"], False)):
        assert huggingface.main(["export.toml", *more, "--dry-run"]) == 0
        assert (note in " ".join(capsys.readouterr().out.split())) == is_noted
