"""Tasks of lm-evaluation-harness with Trivium's decoder: the numbers of the harness's own model, and what is refused.

Skipped where `lm_eval` is not installed.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from configs.loader import ConfigError
from export import evaluate
from pretrain.evaluation import humaneval, text_metrics
from pretrain.generation.text_codec import TextCodec
from tests.tiny_models import ENGLISH, tiny, write_imported
from tests.unit.export.harness_lm import CONTEXT, NEEDS_LM_EVAL, make_lm

pytestmark = NEEDS_LM_EVAL
MANUAL = Path(__file__).resolve().parents[3] / "docs/evaluation.md"
QUESTIONS = [
    {
        "q": f"{ENGLISH[i * 20 : i * 20 + 30 + 40 * i]}",
        "choices": [" the best", " wisdom of it", " a", "春眠"],
        "label": i % 4,
    }
    for i in range(6)
]
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl, train: solved.jsonl}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "Question: {{q}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXTS = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl, train: solved.jsonl}}
output_type: generate_until
training_split: train
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{choices[1]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12}
metric_list: [{metric: bleu}, {metric: bleu_zh}, {metric: chrf}, {metric: rouge1}, {metric: rougeL}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with three tasks and, beside them, their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in (("choice", CHOICE), ("texts", TEXTS), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text(text)
    for name, rows in (("questions", QUESTIONS), ("solved", QUESTIONS[::-1])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_tasks_run_from_the_command_line_and_their_results_collect(
    exported: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Computes metrics again from what the samples say that the model answered."""
    out, samples = tmp_path / "out.json", tmp_path / "samples.jsonl"
    common = [str(exported), "--out", str(out), "--samples", str(samples), "--limit", "4", "--num-fewshot", "1"]
    assert evaluate.main([*common, "--tasks", f"{tasks}"]) == 0
    printed = capsys.readouterr()
    found = json.loads(out.read_text())["tasks"]
    assert {name: values["documents"] for name, values in found.items()} == {"choice": 4, "texts": 4, "write": 4}
    assert found["choice"]["num_fewshot"] == 1 and "choice" in printed.out and "bits_per_byte" in printed.out
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    chosen = [record for record in records if record["task"] == "choice"]
    assert all(record["arguments"][0][0].count("Question: ") == 2 for record in chosen), "one solved example"
    right = 0
    for record in chosen:
        logprobs = [response[0][0] for response in record["resps"]]
        right += max(range(4), key=logprobs.__getitem__) == record["doc"]["label"]
    assert found["choice"]["measures"]["acc"] == right / 4
    bits = -sum(record["resps"][0][0] for record in records if record["task"] == "texts") / 0.6931471805599453
    size = sum(len(record["doc"]["q"].encode()) for record in records if record["task"] == "texts")
    assert found["texts"]["measures"]["bits_per_byte"] == pytest.approx(bits / size)
    assert found["write"]["measures"].keys() == {"bleu", "bleu_zh", "chrf", "rouge1", "rougeL"}

    assert evaluate.main([str(exported), "--out", str(out), "--task-folder", str(tasks), "--tasks", "choice"]) == 0
    again = json.loads(out.read_text())["tasks"]
    assert again["texts"] == found["texts"] and again["choice"]["documents"] == 6


def test_groups_and_tags_find_the_data_beside_their_tasks(tasks: Path, tmp_path: Path, decoder, tokenizer_path) -> None:
    """Finds the data of a group's members, which are in folders of their own, beside each member's file."""
    from pretrain.evaluation.harness_tasks import load_tasks, run_tasks

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "task.yaml").write_text(CHOICE.replace("task: choice", f"task: {name}\ntag: [tagged]"))
        for data in ("questions", "solved"):
            (tmp_path / name / f"{data}.jsonl").write_bytes((tasks / f"{data}.jsonl").read_bytes())
    (tmp_path / "both.yaml").write_text("group: both\ntask: [first, second]\naggregate_metric_list: [{metric: acc}]\n")
    model = make_lm(decoder, TextCodec(tokenizer_path), CONTEXT)
    found = run_tasks(model, load_tasks(["both"], [tmp_path]), limit=3)
    accuracy = found["scores"]["first"]["measures"]["acc"]
    assert found["groups"] == {"both": {"measures": {"acc": pytest.approx(accuracy)}}}
    assert load_tasks(["tagged"], [tmp_path]).documents(4) == {"first": 4, "second": 4}
    with pytest.raises(ConfigError, match=r"task choice has 6 solved examples to show, .*; set --num-fewshot to 6 or"):
        load_tasks(["choice"], [tasks], num_fewshot=7)
    assert (
        run_tasks(model, load_tasks(["choice"], [tasks], num_fewshot=6), limit=1)["scores"]["choice"]["num_fewshot"]
        == 6
    )


@pytest.mark.parametrize("splits", ["test_split: test", "validation_split: test\nfewshot_split: test"])
def test_the_manuals_task_shows_no_document_before_itself(tmp_path: Path, decoder, tokenizer_path, splits: str) -> None:
    """Runs the task of docs/evaluation.md, whose YAML and data are taken from that page."""
    from pretrain.evaluation.harness_tasks import load_tasks, run_tasks

    blocks = dict(
        re.findall(r"^```(yaml|json)\n(.*?)^```", MANUAL.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    )
    (tmp_path / "capitals.yaml").write_text(blocks["yaml"].replace("test_split: test", splits))
    (tmp_path / "capitals.jsonl").write_text(blocks["json"])
    model = make_lm(decoder, TextCodec(tokenizer_path), CONTEXT)
    found = run_tasks(model, load_tasks([str(tmp_path)], num_fewshot=2), keep_samples=True)
    scores = found["scores"]["capitals"]
    assert scores["measures"].keys() == {"exact_match", "bleu", "rougeL"} and scores["documents"] == 3
    records = found["samples"]["capitals"]
    prompts = [record["arguments"][0][0] for record in records]
    assert all(prompt.count("The capital of") == 3 for prompt in prompts)
    capitals = [record["doc"]["capital"] for record in records]
    assert [[capital in prompt for capital in capitals].count(True) for prompt in prompts] == [2, 2, 2]
    assert not any(capital in prompt for capital, prompt in zip(capitals, prompts, strict=True))
    with pytest.raises(ConfigError, match=r"has 2 solved examples to show, .*; set --num-fewshot to 2 or less"):
        load_tasks([str(tmp_path)], num_fewshot=3)


def test_humaneval_runs_the_models_programs(tokenizer_path: Path, decoder: Any, monkeypatch) -> None:
    """Puts answers into the model's mouth: a right one, a wrong one, and one that ends the program."""
    from pretrain.evaluation.harness_tasks import load_tasks, run_tasks

    problems = humaneval.read_problems()[:3]
    answers = [problems[0]["canonical_solution"], "    return 1\n", "    exit(0)\n"]
    model = make_lm(decoder, TextCodec(tokenizer_path), CONTEXT)
    monkeypatch.setattr(model, "generate_until", lambda requests: answers)
    loaded = load_tasks(["humaneval"], num_fewshot=5)  # which its own 0 wins over
    assert loaded.documents(None) == {"humaneval": 164}
    found = run_tasks(model, loaded, limit=3)
    assert found["scores"] == {"humaneval": {"measures": {"pass@1": 1 / 3}, "num_fewshot": 0, "documents": 3}}


@pytest.mark.parametrize(
    ("text", "message", "mended"),
    [
        (
            WRITE.replace("metric: bleu}", "metric: blue}"),
            r"has the metric 'blue', which does not exist; did you mean bl",
            WRITE,
        ),
        (
            WRITE.replace("12}", "12, num_beams: 4}"),
            r"task write sets generation_kwargs\.num_beams = 4, which Trivium's",
            WRITE,
        ),
        (
            WRITE.replace("choices[1]", "choices").replace('"{{choices}}"', "choices"),
            r"has several references .* bleu 0 or 1; give one reference by doc_to_target",
            WRITE,
        ),
        (
            WRITE.replace(
                "metric: bleu}", "metric: sacrebleu, hf_evaluate: true, aggregation: mean, higher_is_better: true}"
            ),
            r"has the metric sacrebleu of the package evaluate, .*; use another in its file, such as .*bleu",
            WRITE,
        ),
        (
            CHOICE.replace("questions.jsonl", "none.jsonl"),
            r"task choice cannot be loaded: FileNotFoundError: .*none\.js",
            CHOICE,
        ),
        (
            CHOICE.replace("dataset_path: json", "dataset_path: some/where").replace("dataset_kwargs", "metadata"),
            r"task choice cannot be loaded: its data are not on this machine .*data_files of a copy .*HF_HUB_OFFLINE=0",
            CHOICE,
        ),
        *(
            (wrong, r"task choice has no documents in its test_split or validation_split; correct its file or", CHOICE)
            for wrong in (
                CHOICE.replace("questions.jsonl", "empty.jsonl"),
                CHOICE + "process_docs: !function choose.none\n",
            )
        ),
        (
            CHOICE + "doc_to_image: [picture]\n",
            r"task choice shows images, and Trivium's models read text alone; leave it out",
            CHOICE,
        ),
        (
            CHOICE + "unsafe_code: true\n",
            r"task choice runs programs .* add --run-unsafe-code to allow that, or use human",
            {"unsafe": True},
        ),
        ("task: [choice", r"wrong\.yaml is not valid YAML: .*; correct it", CHOICE),
        ("test_split: a", r"has no task in it; put YAML files with a `task:` key there", CHOICE),
    ],
)
def test_tasks_that_cannot_be_run_are_told_and_run_as_the_message_says(
    text: str, message: str, mended: str | dict[str, Any], tasks: Path, tmp_path: Path
) -> None:
    """Follows what the message says: `mended` is the file, or the options, as it asks for them."""
    from pretrain.evaluation.harness_tasks import load_tasks

    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    for name in ("questions", "solved"):
        (tmp_path / f"{name}.jsonl").write_bytes((tasks / f"{name}.jsonl").read_bytes())
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "choose.py").write_text("def none(documents):\n    return documents.select([])\n")
    with pytest.raises(ConfigError, match=message):
        load_tasks([str(tmp_path)])
    if isinstance(mended, str):
        file.write_text(mended)
    assert len(load_tasks([str(tmp_path)], **(mended if isinstance(mended, dict) else {})).tasks) == 1
    if isinstance(mended, dict):
        assert load_tasks(["humaneval"]).tasks.keys() == {"humaneval"}


def test_mistakes_on_the_command_line_are_told(
    exported: Path, tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for argv, message in (
        (["--tasks", "humaneval", "--chat"], r"has no chat template; leave out --chat, or name a run of `trivium sft`"),
        (["--tasks", "humaneval", "--humaneval", str(tmp_path)], r"HumanEval's problems are not at"),
        (["--tasks", "x", "--task-folder", str(tmp_path / "no")], r"--task-folder .*no is no folder; name one with"),
        (["--out", "a", "--samples", "./a"], r"--samples \./a is the file of --out too, for the results; name another"),
        ([], r"has no held-out text: it knows no data plan; name a plan by --plan, or give --tasks"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate.main([str(exported), *argv])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"--tasks needs the package lm_eval, which is not installed; run: pip install"
    ):
        evaluate.main([str(exported), "--tasks", "humaneval"])


@pytest.mark.full
def test_an_unknown_name_is_told_with_those_like_it() -> None:
    """Asks for an unknown task, for whose name the harness would read thousands of files of its own tasks."""
    from pretrain.evaluation.harness_tasks import load_tasks

    with pytest.raises(
        ConfigError, match=r"humanevil is no folder, no file and no task's name \(did you mean humaneva"
    ):
        load_tasks(["humanevil"])
    with pytest.raises(ConfigError, match=r"task hellaswag cannot be loaded: its data are not on this machine"):
        load_tasks(["hellaswag"])
    with pytest.raises(ConfigError, match=r"task humaneval_instruct cannot be .*use another metric .*HF_HUB_OFFLINE=0"):
        load_tasks(["humaneval_instruct"])


def test_rouge_knows_words_of_every_script() -> None:
    """Checks numbers found by hand: two of four characters are shared, and four of five words in order."""
    assert text_metrics._rouge("rouge1")(["春眠不觉"], ["春晓不知"]) == pytest.approx(50.0)
    assert text_metrics._rouge("rougeL")(["It was the best of"], ["it was a best of"]) == pytest.approx(80.0)
    assert text_metrics.AnyScript().tokenize("Ein Über-Maß 42, ぱん 한국") == [
        "ein",
        "über",
        "maß",
        "42",
        "ぱ",
        "ん",
        "한",
        "국",
    ]


def test_an_imported_folder_gives_what_its_export_gives(
    exported: Path, tasks: Path, tmp_path: Path, tokenizer_path: Path
) -> None:
    imported, results = tmp_path / "imported", []
    imported.mkdir()
    write_imported(imported, tiny(), tokenizer_path)
    for folder, name in ((imported, "eval/step_0.json"), (exported, "eval.json")):
        assert evaluate.main([str(folder), "--tasks", str(tasks / "texts.yaml")]) == 0
        file = folder / name
        results.append(json.loads(file.read_text())["tasks"]["texts"]["measures"])
        file.unlink()
    assert results[0] == pytest.approx(results[1])
    assert torch.isfinite(torch.tensor(list(results[0].values()))).all()
