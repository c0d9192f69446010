"""Tasks of lm-evaluation-harness in training: the same scores in every layout, and those of `trivium eval` afterwards.

Skipped where `lm_eval` is not installed.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from configs.loader import ConfigError
from export import evaluate
from pretrain import train
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


def test_tasks_are_scored_in_training_in_any_layout(ranks: RanksOf, tmp_path: Path) -> None:
    (tmp_path / "lines.yaml").write_text(TASK)
    lines = ["def f(x):", "return x + 1", "春眠不觉晓", "Licensed under the Apache License"]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    task, found = str(tmp_path / "lines.yaml"), {}
    config = write_config(tmp_path, steps=4, run_dir=tmp_path / "one", rows=40)
    for name, layout in (("one", "tp=1"), ("two", "tp=2"), ("stages", "pp=2")):
        argv = [str(config), f"eval.tasks=['{task}']", "eval.every=2", "eval.task_documents=3"]
        argv += [f"run.dir={tmp_path / name}", f"parallel.{layout}"]
        world = 1 if name == "one" else 2
        worker = "tests.parallel.workers.posttraining:command"
        answers = ranks(world).run(worker, process_group=False, module="pretrain.train", argv=argv)
        assert [answer["status"] for answer in answers] == [0] * world, answers
        found[name] = scores(tmp_path / name)
    assert found["one"].keys() == {2, 4} and len(set(found["one"].values())) == 2, "the weights of the moment"
    for name in ("two", "stages"):
        assert found[name] == pytest.approx(found["one"], rel=1e-4)
    out = tmp_path / "out.json"
    assert evaluate.main([str(tmp_path / "one"), "--tasks", task, "--limit", "3", "--out", str(out)]) == 0
    afterwards: dict[str, Any] = json.loads(out.read_text())["tasks"]["lines"]
    assert afterwards["documents"] == 3
    assert afterwards["measures"]["bits_per_byte"] == pytest.approx(found["one"][4], rel=1e-5)


def test_a_wrong_task_is_told_before_the_first_step(tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=4, run_dir=tmp_path / "run", rows=40)
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"eval\.tasks .*none has no task in it"):
        train.main([str(config), f"eval.tasks=['{tmp_path / 'none'}']"])
    assert not (tmp_path / "run/metrics.jsonl").exists()
