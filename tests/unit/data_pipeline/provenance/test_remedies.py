"""Takes the remedies out of messages about documents, sources and plans, follows them, and tests that they work."""

import json
import re
import shutil
from pathlib import Path

import pytest

from configs.loader import ConfigError
from configs.mixture import PlanConfig
from data_pipeline import command
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.mixture.rows import Plan
from data_pipeline.provenance import document_samples, explain, replan, what_if
from data_pipeline.provenance.lookup import DataSpan, plans
from data_pipeline.provenance.replan import rest
from data_pipeline.report import ledger_tables
from data_pipeline.tokens.sentencepiece_training import proto
from tests.small_sources import write_config

MIXTURE = "[mixture]\nseq_length = 32\nsamples = 10\nweights = { big = 1.0 }\n"


def test_a_document_and_a_source_are_found_as_the_messages_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finds documents of an input in which every second record has no id of its own."""
    config = write_config(tmp_path, {"big": 6}, MIXTURE)
    records = [json.loads(line) for line in (tmp_path / "big.jsonl").read_text().splitlines()]
    for record in records[1::2]:
        del record["id"]
    records[3]["text"] = records[4]["text"] = "too few words"
    (tmp_path / "big.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert command.main([str(config), "--until", "filter"]) == 0
    args = [str(config)]
    with pytest.raises(
        ConfigError,
        match="give a record's own id, or SOURCE/FILE/POSITION of one that has none",
    ) as said:
        explain.main([*args, "--id", "big/99"])
    location = re.findall(r"or (SOURCE\S+)", str(said.value))[0]
    for name in ("big/4", location.replace("SOURCE", "big").replace("FILE", "big.jsonl").replace("POSITION", "4")):
        assert explain.main([*args, "--id", name]) == 0
        assert "dropped: word_count_min" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--source 'small' is no source; known: big$") as said:
        document_samples.main([*args, "--stage", "filter", "--source", "small"])
    assert document_samples.main([*args, "--stage", "filter", "--source", str(said.value).rpartition(" ")[2]]) == 0

    # What a stage says of an earlier input is not said of a later one, whose documents are in other rows.
    (tmp_path / "big.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[::-1]))
    assert command.main([*args, "--until", "language"]) == 0
    capsys.readouterr()
    assert explain.main([*args, "--id", "big/4"]) == 0 and ledger_tables.main(args) == 0
    shown = capsys.readouterr().out
    assert "language" in shown and "word_count_min" not in shown
    for main, more in ((document_samples.main, ["--stage", "filter"]), (what_if.main, ["word_count.min=9"])):
        with pytest.raises(ConfigError, match=r"holds no (finished stage 'filter'|scores yet); run: trivium data run"):
            main([*args, *more])
    assert command.main([*args, "--until", "filter"]) == 0
    assert document_samples.main([*args, "--stage", "filter"]) == 0
    (tmp_path / "run/ledger.json").write_text('{"stages": []}')  # as it is while the first stage runs again
    assert ledger_tables.main(args) == 1
    assert "lists no finished stage; run: trivium data run CONFIG" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("",), ("general", "late")])
def test_a_mixture_that_a_run_has_used_up_is_raised_as_the_message_says(names: tuple[str, ...]) -> None:
    stages = {name: PlanConfig(seq_length=8, samples=100 + 50 * n, weights={"a": 1.0}) for n, name in enumerate(names)}
    for used in (250, 400):
        with pytest.raises(ConfigError, match=r"in all, the used ones among them; raise mixture") as said:
            rest(stages, used)
        key, above = re.findall(r"raise (mixture\S+) above ([\d,]+)$", str(said.value))[0]
        name = names[-1]
        assert key == (f"mixture.stages.{name}.samples" if name else "mixture.samples")
        most = int(above.replace(",", ""))
        with pytest.raises(ConfigError):
            rest({**stages, name: stages[name].model_copy(update={"samples": most})}, used)
        left = rest({**stages, name: stages[name].model_copy(update={"samples": most + 1})}, used)
        assert {stage: one.samples for stage, one in left.items()} == {name: 1}


def test_a_plan_that_was_moved_away_is_found_once_it_is_back(
    tokens: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    for seed, folder in ((1, "run/plan"), (2, "other/plan")):
        settings = PlanConfig(seq_length=64, samples=40, seed=seed, weights={"code": 1.0})
        build_plan(tokens, tokenizer_folder, tmp_path / folder, settings)
    own, other = tmp_path / "run", tmp_path / "other/plan"
    span = DataSpan(5, 20, 4, Plan.open(other).fingerprint, str(other))
    other.rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"steps from 5 on .* is no longer at (\S+), nor .*; move it back there$"
    ) as said:
        plans(own, [span])
    back = re.findall(r"no longer at ([^\s,]+)", str(said.value))[0]
    (tmp_path / "elsewhere").rename(back)
    assert len(plans(own, [span])) == 2


def test_a_plan_goes_on_with_the_tokenizer_of_the_plan_before(
    tokens: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Compares another data run's tokenizer, of as many tokens and with the same ones, with that of the plan."""
    build_plan(
        tokens, tokenizer_folder, tmp_path / "plan", PlanConfig(seq_length=64, samples=40, weights={"code": 1.0})
    )
    plan, other = Plan.open(tmp_path / "plan"), tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, other)
    replan.check_tokenizer(other, plan, tmp_path / "step_2")
    model = proto.ModelProto()
    model.ParseFromString((other / "tokenizer.model").read_bytes())
    model.pieces[-1].score, model.pieces[-2].score = model.pieces[-2].score, model.pieces[-1].score
    (other / "tokenizer.model").write_bytes(model.SerializeToString())
    (other / "info.json").unlink()
    with pytest.raises(ConfigError, match=r"a run cannot go on with other tokens, .*set tokenizer\.file=(\S+)") as said:
        replan.check_tokenizer(other, plan, tmp_path / "step_2")
    named = re.findall(r"set tokenizer\.file=(\S+)", str(said.value))[0]
    replan.check_tokenizer(Path(named), plan, tmp_path / "step_2")
