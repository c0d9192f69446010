"""Export of a trained run to a Hugging Face directory, by the commands that a user types."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.mixture import PlanConfig
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.tokens.tokenizer import Tokenizer
from export import generate, huggingface, import_hf
from posttrain.chat.chat_format import jinja_template
from tests.parallel.harness import RanksOf
from tests.small_data import CHINESE, VOCAB, make_tokens
from tests.training_configs import write_training_config

ROOT = Path(__file__).resolve().parents[2]
SEQ_LENGTH = 64
MODEL = {
    "vocab_size": VOCAB,  # an odd number
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
}


def run(*command: str) -> str:
    """Runs a module as a process of its own; if it fails, the error has its output."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plan over two sources, prose and Python, with held-out documents."""
    folder = tmp_path_factory.mktemp("data")
    tokens, tokenizer = make_tokens(folder)
    build_plan(
        tokens,
        tokenizer,
        folder / "plan",
        PlanConfig(seq_length=SEQ_LENGTH, samples=32, seed=1, weights={"code": 1.0, "prose": 1.0}, max_epochs=8),
    )
    return folder / "plan"


def pretraining(folder: Path, plan: Path, moe: bool) -> Path:
    """Writes the config of a run of four steps in `folder`/run; its high learning rate moves the weights far."""
    return write_training_config(
        folder / "train.toml",
        folder / "run",
        4,
        (4, 4),
        SEQ_LENGTH,
        run={"seed": 1},
        model=MODEL | ({"moe": {"num_experts": 4, "top_k": 2}, "num_kv_heads": 1} if moe else {}),
        data={"plan": str(plan)},
        optimizer={"lr": 0.02},
        schedule={"kind": "cosine"},
        checkpoint={"every": 2},
        eval={"rows": 0},
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, plan: Path) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    run("pretrain.train", str(pretraining(folder, plan, moe=False)))  # a single process, no launcher
    return folder / "run"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the terminal wide, so that no sentence that a test looks for is wrapped."""
    monkeypatch.setenv("COLUMNS", "240")


def export(folder: Path, run_dir: Path, *more: str) -> int:
    config = folder / "export.toml"
    keys = {"run": str(run_dir), "out": str(folder / "hf"), "sample_tokens": 8, "verify": {"greedy_tokens": 32}}
    config.write_text(tomli_w.dumps(keys))
    return huggingface.main([str(config), *more])


def test_dense_run_to_hugging_face_and_back(tmp_path, dense, plan, capsys):
    launcher = json.loads((dense / "env.json").read_text())["launcher"]
    assert launcher["launcher"] == "single" and "master_port" not in launcher
    assert export(tmp_path, dense) == 0
    printed = capsys.readouterr().out
    assert "of 8 held-out passages" in printed  # four per source
    assert "written by transformers" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert tokenizer(CHINESE).input_ids == [1, *Tokenizer.load(plan.parent / "tokenizer").encode(CHINESE)]
    ids = torch.tensor([tokenizer("def main(").input_ids])
    assert model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape[1] == ids.shape[1] + 4

    assert import_hf.main([str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    greedy = ["--prompt", "def main(", "--temperature", "0", "--max-new-tokens", "16"]
    capsys.readouterr()
    assert generate.main([str(dense), *greedy]) == 0
    first = capsys.readouterr().out
    assert generate.main([str(tmp_path / "back"), *greedy]) == 0
    assert capsys.readouterr().out == first
    assert first.startswith("def main(")


def test_a_second_export_is_skipped_until_something_changes(tmp_path, dense, capsys):
    assert export(tmp_path, dense) == 0
    stamp = (tmp_path / "hf/config.json").stat().st_mtime_ns
    capsys.readouterr()
    assert export(tmp_path, dense) == 0
    assert "up to date" in capsys.readouterr().out
    assert (tmp_path / "hf/config.json").stat().st_mtime_ns == stamp
    assert export(tmp_path, dense, "step=2") == 0
    record = json.loads((tmp_path / "hf/trivium_export.json").read_text())
    assert record["made_from"]["step"] == 2
    assert export(tmp_path, dense, "step=2", "--force") == 0
    assert "published" in capsys.readouterr().out


@pytest.mark.full
def test_moe_run_to_hugging_face(tmp_path, plan, ranks: RanksOf, capsys):
    """Exports from two ranks that pad the odd vocabulary and hold the same key-value head: the export shows neither."""
    train = {"module": "pretrain.train", "argv": [str(pretraining(tmp_path, plan, moe=True)), "parallel.tp=2"]}
    answers = ranks(2).run("tests.parallel.workers.posttraining:command", process_group=False, **train)
    assert [answer["status"] for answer in answers] == [0, 0], answers
    assert export(tmp_path, tmp_path / "run", "dtype=bfloat16") == 0
    assert "MixtralForCausalLM" in capsys.readouterr().out


def test_fine_tuned_run_takes_its_chat_template_along(tmp_path, dense, ranks: RanksOf, capsys):
    config = write_training_config(
        tmp_path / "sft.toml",
        tmp_path / "sft",
        2,
        (4, 4),
        SEQ_LENGTH,
        run={"seed": 1},
        data={},
        init={"run": str(dense)},
        task={"name": "sort", "digits": 3, "demonstrations": 50, "eval_prompts": 1},
        optimizer={"lr": 1e-3},
        schedule={"kind": "cosine"},
        eval={"rows": 0},
    )
    tune = {"module": "posttrain.sft", "argv": [str(config)]}
    (answer,) = ranks(1).run("tests.parallel.workers.posttraining:command", process_group=False, **tune)
    assert answer["status"] == 0, answer
    assert export(tmp_path, tmp_path / "sft") == 0
    printed = capsys.readouterr().out
    assert "of 8 held-out passages" in printed  # from the plan that its pretraining run was trained on
    assert "chat template" in printed
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert tokenizer.chat_template == jinja_template()


def test_damaged_checkpoints_are_named_and_nothing_is_published(tmp_path, dense, capsys):
    shutil.copytree(dense, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step_4"
    file = next(newest.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert export(tmp_path, tmp_path / "run", "step=4") == 1
    assert file.name in capsys.readouterr().out
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / ".hf.partial").exists()
    # Now another checkpoint is the newest whole one.
    assert export(tmp_path, tmp_path / "run") == 0
    assert json.loads((tmp_path / "hf/trivium_export.json").read_text())["made_from"]["step"] == 2
