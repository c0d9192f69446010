"""Table and page of a recipe: what they say of the results of stages."""

import io
import json
import re
from pathlib import Path

from rich.console import Console

from launch.recipe_report import show_comparison, write_html
from launch.recipe_results import describe_baselines, describe_data, describe_export, describe_training
from launch.recipe_stages import RecipeStage
from tests.browser import Browser


def test_what_stages_wrote_is_told(tmp_path: Path) -> None:
    def write(name: str, *records: dict) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(json.dumps(record) for record in records))

    total = {"in": {"documents": 1200, "bytes": 5_000_000}, "kept": {"documents": 900, "bytes": 4_000_000}}
    write("ledger.json", {"stages": [{"name": "extract", "total": total}, {"name": "documents", "total": total}]})
    write("plan/plan.json", {"samples": 64, "seq_length": 256, "sources": [{"tokens": 1_500_000}, {"tokens": 500_000}]})
    assert describe_data(tmp_path) == (
        "1,200 documents, 5.0 MB",
        "900 documents kept, 2.00M tokens\n64 rows of 256",
    )
    write(
        "metrics.jsonl",
        {"step": 1, "tokens": 1000, "loss": 9.0},
        {"step": 1, "eval": {"code": {"loss": 8.0, "bits_per_byte": 3.0}}},
        {"step": 2, "tokens": 2_000_000, "loss": 4.0},
        {"step": 2, "eval": {"code": {"loss": 4.0, "bits_per_byte": 1.5}}},
    )
    came_in, out = describe_training(tmp_path)
    assert came_in == "2 steps, 2.00M tokens"
    assert out == "loss 9.00 → 4.00\nheld-out bits a byte: code 3.00 → 1.50"
    several = {"all answers": {"sampled": 0.6}, "all answers, sort/format": {"sampled": 1.0}}
    several["all answers, sort/accuracy"] = {"sampled": 0.5}
    write("metrics.jsonl", {"step": 1, "tokens": 1000, "loss": 9.0}, {"step": 1, "eval": several})
    assert describe_training(tmp_path)[1].endswith("\nmean score, sampled: all answers 0.60, sort/accuracy 0.50")
    for score, said in (
        (0.6, "answered right, sampled: sort answers 0.60"),
        (-2, "mean score, sampled: sort answers -2"),
    ):
        write("metrics.jsonl", {"step": 1, "loss": 9.0, "tokens": 9}, {"eval": {"sort answers": {"sampled": score}}})
        assert f"\n{said}" in describe_training(tmp_path)[1]
    judged = {
        "pairs": {"accuracy": 0.75},
        "confidence 0.50 to 0.60": {"accuracy": 0.25, "confidence": 0.5, "share": 1.0},
    }
    write("metrics.jsonl", {"step": 1, "loss": 9.0, "tokens": 9}, {"eval": judged})
    assert describe_training(tmp_path)[1].endswith("\nheld-out accuracy: pairs 0.75")
    write("trivium_export.json", {"checkpoint": "a/step_2", "checks": {"logits, max": "1e-6"}})
    assert describe_export(tmp_path) == ("step_2", "logits, max: 1e-6")
    assert describe_training(tmp_path / "nothing") == ("", "")


def test_models_are_compared_with_xz_and_ngrams_on_each_source(browser: Browser, tmp_path: Path) -> None:
    for name in ("data", "dense", "sft"):
        (tmp_path / name).mkdir()
    values = {"code": {"bytes": 2000, "xz": 1.861, "ngram": 1.5}, "web": {"bytes": 3000, "xz": 2.868, "ngram": 1.291}}
    (tmp_path / "data/baselines.json").write_text(
        json.dumps({"titles": {"ngram": "5-gram", "xz": "xz -9"}, "sources": values})
    )
    evals = [
        {"step": 1, "eval": {"code": {"bits_per_byte": 3.0}}},
        {"step": 2, "eval": {"code": {"bits_per_byte": 2.5}}},
    ]
    (tmp_path / "dense/metrics.jsonl").write_text("\n".join(map(json.dumps, evals)))
    (tmp_path / "sft/metrics.jsonl").write_text(json.dumps({"step": 1, "eval": {"sort": {"bits_per_byte": 0.5}}}))
    stages = [
        RecipeStage("data", "data", (), tmp_path / "data", "plan/plan.json", describe_data),
        RecipeStage("baselines", "xz and 5-gram", (), tmp_path / "data", "baselines.json", describe_baselines),
        RecipeStage("pretrain", "dense", (), tmp_path / "dense", "metrics.jsonl", describe_training),
        RecipeStage("sft", "SFT", (), tmp_path / "sft", "metrics.jsonl", describe_training),
    ]
    assert describe_baselines(tmp_path / "data") == ("5 kB of held-out text", "bits a byte, below: 5-gram, xz -9")
    text = io.StringIO()
    show_comparison(stages, Console(file=text, width=100))
    cells = [line.split() for line in text.getvalue().splitlines()]
    assert ["source", "dense", "5-gram", "xz", "-9"] in cells
    assert ["code", "2.50", "1.50", "1.86"] in cells and ["web", "1.29", "2.87"] in cells
    times = {stage.name: {"seconds": 1.0} for stage in stages}
    page = write_html("Recipe", stages, times, [], tmp_path).read_text()
    assert "<tr><td>code</td><td class=n>2.50</td><td class=n>1.50</td><td class=n>1.86</td></tr>" in page
    assert [float(part) for part in re.findall(r"margin-left: ([\d.]+)%", page)] == [0, 25, 50, 75]
    for stage in ("dense", "sft"):
        (tmp_path / stage / "report.html").write_text("<p>Curves.</p>")
    assert not browser.all_faults(tmp_path / "report.html")
