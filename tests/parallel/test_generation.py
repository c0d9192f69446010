"""Generation with a model split over two ranks writes what one process writes."""

import io
import json
from pathlib import Path

import pytest

from configs.model import ModelConfig
from configs.model_parts import AttentionConfig, DeltaConfig, LatentConfig, LayerKind
from export import chat, generate
from posttrain.chat.chat_format import jinja_template
from tests.parallel.harness import RanksOf
from tests.tiny_models import ENGLISH, tiny, train_tokenizer, write_imported

# The vocabulary is padded at tp=2, and the second model's ranks hold the same key-value head.
DENSE = tiny(vocab_size=803)
TIED = tiny(tie=True).model_copy(update={"num_kv_heads": 1})
MOE = tiny(moe=True, vocab_size=801)
LATENT = tiny(vocab_size=803).model_copy(
    update={
        **{"num_kv_heads": 4, "head_dim": None},
        "attention": AttentionConfig(
            latent=LatentConfig(q_rank=14, kv_rank=10, nope_head_dim=6, rope_head_dim=8, v_head_dim=5)
        ),
    }
)
DELTA = tiny(vocab_size=803).model_copy(
    update={
        "attention": AttentionConfig(
            output_gate=True,
            delta=DeltaConfig(num_key_heads=2, num_value_heads=6, key_head_dim=6, value_head_dim=10),
        ),
        **{"layer_pattern": ("linear", "full"), "kinds": {"linear": LayerKind(), "full": LayerKind(delta=False)}},
    }
)
SAMPLED = ["--top-k", "200", "--top-p", "0.95", "--min-p", "0.001", "--repetition-penalty", "1.1", "--stop", "q"]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("config", "degree"),
    [(DENSE, "tp"), (TIED, "tp"), (LATENT, "tp"), (DELTA, "tp"), (MOE, "tp"), (MOE, "ep")],
    ids=["dense", "tied", "latent", "delta", "moe-tp", "moe-ep"],
)
def test_a_split_model_writes_what_a_whole_one_writes(
    ranks: RanksOf, tmp_path: Path, tokenizer_path: Path, config: ModelConfig, degree: str
) -> None:
    model = str(write_imported(tmp_path, config, tokenizer_path))
    prompts, whole, split = (tmp_path / name for name in ("prompts.jsonl", "whole.jsonl", "split.jsonl"))
    prompts.write_text("".join(json.dumps({"prompt": ENGLISH[: 20 * n]}) + "\n" for n in range(5)))
    for options in (["--temperature", "0"], SAMPLED):
        common = [model, "--prompts", str(prompts), "--max-new-tokens", "10", "--batch-size", "3", *options]
        assert generate.main([*common, "--output", str(whole)]) == 0
        argv = [*common, "--output", str(split), f"parallel.{degree}=2"]
        answers = ranks(2).run(
            "tests.parallel.workers.posttraining:command", process_group=False, module="export.generate", argv=argv
        )
        assert [answer["status"] for answer in answers] == [0, 0], answers
        assert split.read_text() == whole.read_text()
        split.unlink()


def test_each_rank_holds_a_part(ranks: RanksOf, tmp_path: Path, tokenizer_path: Path) -> None:
    model = write_imported(tmp_path, MOE, tokenizer_path)
    run = {"function": "tests.parallel.workers.generation:shares", "process_group": False, "source": str(model)}
    ((weights, cache),) = ranks(1).run(**run, keys={})
    for keys, most, cached in (({"tp": 2}, 0.51, 0.5), ({"ep": 2}, 0.85, 1)):
        for own, rows in ranks(2).run(**run, keys=keys):
            assert own < most * weights and rows == cached * cache


def test_one_rank_reads_what_is_typed_and_prints(
    ranks: RanksOf, tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    model = str(write_imported(tmp_path, DENSE, tokenizer_path, jinja_template()))
    typed, options = "It was\n\n/reset\nthe best\nand\n", ["--max-new-tokens", "6"]
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    chat.main([model, *options])
    function = "tests.parallel.workers.generation:chat"
    answers = ranks(2).run(function, process_group=False, argv=[model, *options, "parallel.tp=2"], typed=typed)
    assert [answer["said"] for answer in answers] == [capsys.readouterr().out, ""]


def test_ranks_that_do_not_fit_are_refused(ranks: RanksOf, tmp_path: Path, tokenizer_path: Path) -> None:
    model = str(write_imported(tmp_path, DENSE, tokenizer_path))

    def refused(*keys: str) -> str:
        argv = [model, "--prompt", "It was", *keys]
        answers = ranks(2).run(
            "tests.parallel.workers.posttraining:command", process_group=False, module="export.generate", argv=argv
        )
        assert [answer["status"] for answer in answers] == [2, 2] and answers[0]["error"] == answers[1]["error"]
        return answers[0]["error"]

    assert "1 * 1 is not the 2 ranks that were started; start 1, or set parallel.tp=2" in refused()
    assert "parallel.tp" in refused("parallel.tp=3")
    assert "the model has none" in refused("parallel.ep=2")
