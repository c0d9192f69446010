"""Tasks of lm-evaluation-harness in training: the same scores in every layout, and those of `trivium eval` afterwards.

Skipped where `lm_eval` is not installed.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from configs.loader import ConfigError, load
from configs.train import PretrainConfig
from export import evaluate
from pretrain.checkpoint.lineage import Lineage
from pretrain.evaluation.task_scores import task_scores
from pretrain.logs import text_samples_file
from tests.e2e.small_lineage import rewarding, tuning
from tests.parallel.harness import RanksOf
from tests.small_training import write_config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed; it is one of the packages of: pip install '.[eval]'",
)
TASK = """
task: lines
dataset_path: json
dataset_kwargs: {data_files: {test: lines.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


def scores(run: Path) -> dict[int, float]:
    """Returns the task's score at each step at which the run was evaluated."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval"]["task lines"]["bits_per_byte"] for line in lines if "eval" in line}


def score_afterwards(run: Path, task: str, *options: str) -> float:
    """Returns the score that `trivium eval` gives the run's newest checkpoint."""
    out = run / "out.json"
    assert evaluate.main([str(run), "--rows", "0", "--tasks", task, "--limit", "3", "--out", str(out), *options]) == 0
    found: dict[str, Any] = json.loads(out.read_text())["tasks"]["lines"]
    assert found["documents"] == 3
    return float(found["measures"]["bits_per_byte"])


def test_tasks_are_scored_in_training_in_any_layout(ranks: RanksOf, tmp_path: Path) -> None:
    """Scores pretraining, and then SFT of an adapter and GRPO, which start from that run."""
    (tmp_path / "lines.yaml").write_text(TASK)
    lines = ["def f(x):", "return x + 1", "春眠不觉晓", "Licensed under the Apache License"]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    task, found, written = str(tmp_path / "lines.yaml"), {}, {}
    config = write_config(tmp_path, steps=4, run_dir=tmp_path / "one", rows=40)
    tasks = [f"eval.tasks=['{task}']", "eval.every=2", "eval.task_documents=3"]
    tasks += ["eval.prompts=['def f(', '春眠']", "eval.prompt_tokens=6"]

    def call(module: str, config: Path, *overrides: str, world: int) -> None:
        worker = "tests.parallel.workers.posttraining:command"
        argv = [str(config), *tasks, *overrides]
        answers = ranks(world).run(worker, process_group=False, module=module, argv=argv)
        assert [answer["status"] for answer in answers] == [0] * world, answers

    for name, layout in (("one", "tp=1"), ("two", "tp=2"), ("stages", "pp=2")):
        overrides = f"run.dir={tmp_path / name}", f"parallel.{layout}"
        call("pretrain.train", config, *overrides, world=1 if name == "one" else 2)
        found[name] = scores(tmp_path / name)
        written[name] = text_samples_file.read(tmp_path / name)
    assert written["two"] == written["stages"] == written["one"] and written["one"].keys() == {"def f(", "春眠"}
    assert [step for step, text in written["one"]["def f("] if text] == [2, 4]
    assert found["one"].keys() == {2, 4} and len(set(found["one"].values())) == 2, "the weights of the moment"
    for name in ("two", "stages"):
        assert found[name] == pytest.approx(found["one"], rel=1e-4)
    assert score_afterwards(tmp_path / "one", task) == pytest.approx(found["one"][4], rel=1e-5)

    one, sft, grpo = (tmp_path / name for name in ("one", "sft", "grpo"))
    later = tmp_path / "later.toml"
    later.write_text(tomli_w.dumps(tuning(tmp_path, sft, run=str(one)) | {"adapter": {"rank": 4, "alpha": 64.0}}))
    call("posttrain.sft", later, "parallel.tp=2", "eval.chat=true", world=2)
    assert score_afterwards(sft, task, "--chat") == pytest.approx(scores(sft)[2], rel=1e-5)
    later.write_text(tomli_w.dumps(rewarding(one, grpo)))
    call("posttrain.grpo", later, "eval.at_start=true", world=1)
    assert score_afterwards(grpo, task) == pytest.approx(scores(grpo)[2], rel=1e-5)
    assert scores(grpo)[2] != found["one"][4] != scores(sft)[2]
    assert scores(grpo)[0] == pytest.approx(found["one"][4], rel=1e-5), "before the first step it is what it began from"


def test_a_wrong_task_is_told_before_the_first_step(ranks: RanksOf, tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=4, run_dir=tmp_path / "run", rows=40)
    (tmp_path / "none").mkdir()
    (tmp_path / "lines.yaml").write_text(TASK)
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n')
    for overrides, said in (
        ([f"eval.tasks=['{tmp_path / 'none'}']"], r"eval\.tasks .*none has no task in it"),
        ([f"eval.tasks=['{tmp_path / 'lines.yaml'}']", "eval.chat=true"], r"no chat template; set eval\.chat=false"),
    ):
        worker = "tests.parallel.workers.posttraining:command"
        argv = [str(config), *overrides]
        (answer,) = ranks(1).run(worker, process_group=False, module="pretrain.train", argv=argv)
        assert answer["status"] == 2 and re.search(said, answer["error"]), answer
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_reward_model_scores_no_tasks(tmp_path: Path) -> None:
    config = load(PretrainConfig, write_config(tmp_path, steps=4, run_dir=tmp_path / "run", rows=40))
    assert task_scores(config, config.model.with_values(), Lineage()) == []
    asked = config.model_copy(update={"eval": config.eval.model_copy(update={"tasks": ("lines",)})})
    with pytest.raises(ConfigError, match=r"eval\.tasks is for a model that writes text.*leave it out"):
        task_scores(asked, config.model.with_values(), Lineage())
    with pytest.raises(ConfigError, match=r"eval\.tasks needs the model's tokenizer"):
        task_scores(asked, config.model, Lineage())
