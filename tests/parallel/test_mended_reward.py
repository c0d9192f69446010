"""GRPO with a reward function that can score nothing that the model writes: what the run says, and that it helps."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.loader import toml
from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS
from tests.small_data import VOCAB, make_tokens
from tests.training_configs import training_config

WORKER = "tests.parallel.workers.posttraining:command"
REWARD = {"kind": "function", "function": "tests.parallel.workers.mended_reward:score"}


@pytest.mark.full
def test_a_reward_that_scores_nothing_is_mended_and_the_run_goes_on(ranks: RanksOf, tmp_path: Path) -> None:
    """Begins from a model that has learned to answer everything by one word, so that no completion is cut.

    The reward is mended for the problems of training first, and then for those that are held out.
    """
    for name in ("trained", "heldout"):
        row = {"completion": "7", "answer": "8", "mended": str(tmp_path / f"{name} mended")}
        rows = [{"prompt": f"Say {n} {name}", "number": n, **row} for n in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, tokenizer = make_tokens(tmp_path)
    ranks(1).run(
        "tests.parallel.workers.posttraining:save_untrained",
        process_group=False,
        run_dir=str(tmp_path / "base"),
        model={**MODELS["dense"], "vocab_size": VOCAB},
        tokenizer=str(tokenizer / "tokenizer.model"),
    )

    def command(name: str, steps: int, **sections: dict[str, Any]) -> dict[str, Any]:
        settings = training_config(tmp_path / name, steps, (4, 4), 48, eval={"rows": 0}, **sections)
        (tmp_path / f"{name}.toml").write_bytes(toml(settings))
        argv = [str(tmp_path / f"{name}.toml")]
        (answer,) = ranks(1).run(WORKER, process_group=False, module=f"posttrain.{name}", argv=argv)
        return dict(answer)

    def reinforced(steps: int) -> dict[str, Any]:
        files = {"files": [str(tmp_path / "trained.jsonl")], "heldout_files": [str(tmp_path / "heldout.jsonl")]}
        task = {"kind": "file", **files, "eval_prompts": 2, "rewards": {"mine": REWARD}}
        init = {"run": str(tmp_path / "sft")}
        return command("grpo", steps, optimizer={"lr": 0.01}, init=init, task=task, grpo={"group_size": 2})

    dialogues = {"dialogues": [str(tmp_path / "trained.jsonl")], "heldout_share": 0}
    begin = {"run": str(tmp_path / "base")}
    assert command("sft", 30, optimizer={"lr": 0.03}, init=begin, data=dialogues)["status"] == 0
    refused = reinforced(1)
    assert refused["status"] == 1
    assert "'file' could score none of the 4 completions of prompts 0 to 1; mend its reward" in refused["error"]
    (tmp_path / "trained mended").touch()
    warned = reinforced(1)
    assert warned["status"] == 0, warned
    assert "warning: none of the greedy and sampled answers to 2 held-out prompts of 'file' could be" in warned["said"]
    assert "so they are not measured; mend the task's rewards" in warned["said"]
    (tmp_path / "heldout mended").touch()
    mended = reinforced(2)
    assert mended["status"] == 0 and "none of" not in mended["said"], mended
    lines = [json.loads(line) for line in (tmp_path / "grpo/metrics.jsonl").read_text().splitlines()]
    measured = [(line["step"], line["eval"]["file answers"]) for line in lines if line.get("eval")]
    assert measured == [(2, {"greedy": 0.0, "sampled": 0.0})]
