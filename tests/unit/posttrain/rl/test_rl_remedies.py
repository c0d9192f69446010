"""Messages about samples: each fault is made, the words are read, and what they say is done."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.model_parts import HeadConfig
from configs.sample import KeepSection
from posttrain.chat.chat_format import ChatFormat
from posttrain.rejection.keeping import NotKept, kept_of_prompt
from posttrain.rejection.kept_dialogues import Counts
from posttrain.rejection.rejection_run import _lines, _mean
from posttrain.rejection.samples import DrawnSample
from posttrain.rewards.dialogue_scorer import RewardModel
from posttrain.rl import record_rollouts
from posttrain.rl.vllm_child import VLLMEngine
from pretrain.checkpoint.lineage import Pin
from pretrain.model import Decoder, init_weights
from tests.tiny_models import wide_decoder


def test_the_command_that_samples_waits_for_the_one_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    trainer: Any = SimpleNamespace(run=SimpleNamespace(path="run"), print=said.append)
    there = iter([False, False, True])
    monkeypatch.setattr(record_rollouts, "load_weights_after", lambda trainer, step: next(there))
    monkeypatch.setattr(record_rollouts, "SAYS_SECONDS", -1.0)
    monkeypatch.setattr(record_rollouts, "POLL_SECONDS", 0.0)
    record_rollouts._load(trainer, 4)
    assert said == ["waiting for step 4 of run, which the command that trains has to reach"] * 2


def test_vllm_says_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    empties = [False, True]
    model = SimpleNamespace(collective_rpc=lambda *given, **more: None, reset_prefix_cache=lambda: empties.pop(0))
    known = SimpleNamespace(get_supported_archs=lambda: ["LlamaForCausalLM"])
    fake = SimpleNamespace(__version__="0.1", ModelRegistry=known, LLM=lambda **settings: model)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    setup = {"architecture": "OtherForCausalLM", "folder": "x", "dtype": "float32", "room": 8, "cache_bytes": 1}
    with pytest.raises(ValueError, match=r"vLLM 0\.1 has no model class OtherForCausalLM"):
        VLLMEngine(setup)
    engine = VLLMEngine(setup | {"architecture": "LlamaForCausalLM"})
    with pytest.raises(RuntimeError, match="vLLM did not empty its cache of prefixes"):
        engine.reload("x")
    assert engine.reload("x") == {}


def test_a_run_that_keeps_no_sample_says_how_it_keeps_some() -> None:
    sample = DrawnSample(0, "sort/21", 0, "12", 3, True, 0.0, 0.5, "wrong order")
    config: Any = SimpleNamespace(task=SimpleNamespace(is_scored=True))

    def lines(**keep: Any) -> list[str]:
        counts, set_aside = Counts(), NotKept()
        kept = kept_of_prompt([sample], KeepSection(**keep), True, lambda sample: None, set_aside)
        counts.add([sample], kept)
        return _lines(counts, set_aside, config, Path("run"))

    assert lines(min_score=1)[-1] == (
        "error: none of 1 samples is kept, so there are no dialogues; loosen keep.min_score and run the same command "
        "again, which keeps the samples"
    )
    assert lines(min_score=0.5) == [
        "mean score 0.500, of each prompt's best 0.500",
        "prompts by the number of completions kept: 1: 1",
        "1 of 1 samples kept, of 1 of 1 prompts: run/dialogues.jsonl",
    ]
    assert _mean([sample, replace(sample, score=1.0)]) == ", mean score of the last ones 0.750"


def test_classes_are_read_as_values_and_not_as_a_score(chat: ChatFormat) -> None:
    config = wide_decoder(400).model_config
    models = {}
    for outputs in (3, 2):
        decoder = Decoder(config.model_copy(update={"head": HeadConfig(kind="scalar", outputs=outputs)}))
        init_weights(decoder, seed=1)
        models[outputs] = RewardModel(decoder.eval(), chat, Pin("x", 1, ""))
    dialogue: Any = [{"role": "user", "content": "Sort 21"}, {"role": "assistant", "content": "12"}]
    with pytest.raises(ValueError, match="the model has 3 classes, and a reward is one number; use `values`"):
        models[3].scores([dialogue])
    assert [len(values) for values in models[3].values([chat.render(dialogue)[0].tolist()])] == [3]
    assert len(models[2].scores([dialogue])) == 1
