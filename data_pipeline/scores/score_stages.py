"""The score and filter stages: one computes scores from texts, the other applies thresholds to the tables of scores.

They are separate so that changed thresholds do not need another scan of the texts.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from configs.loader import plain
from data_pipeline.core.ledger import Tally
from data_pipeline.core.run_context import COMPILED_ONCE, RunContext, scan_texts
from data_pipeline.core.stage import Stage, file_hashes
from data_pipeline.core.tables import count_verdicts, shards_of
from data_pipeline.scan.scores import Definition, Scanner, definition_of
from data_pipeline.scores.filtering import ApplyRules
from data_pipeline.scores.model_scores import ModelScores, model_files
from data_pipeline.scores.scoring import ScoreTexts


def score_stage(context: RunContext, language: Stage) -> Stage:
    """Returns the score stage, which scores each text that the language stage kept, by its rule set's definition."""
    config = context.config
    definitions = {name: definition_of(rules) for name, rules in config.rules.items()}
    models = model_files(config.scores)
    return Stage(
        "score",
        partial(_score, context, definitions),
        {
            "definitions": {name: asdict(definition) for name, definition in definitions.items()},
            "scores": plain(config.scores),
        },
        ("scores.scoring",),
        needs=(language,),
        counted_against=language,
        inputs=file_hashes(models, context.run_dir / "logs" / "models.json") if models else "",
        packages=("fasttext-predict",),
    )


def filter_stage(context: RunContext, score: Stage) -> Stage:
    """Returns the filter stage, which compares scores with the thresholds of the rule sets."""
    return Stage(
        "filter",
        partial(_filter, context),
        {name: plain(rules) for name, rules in context.config.rules.items()},
        ("scores.filtering",),
        needs=(score,),
        counted_against=score,
    )


def _score(context: RunContext, definitions: dict[str, Definition], folder: Path, logs: Path) -> Tally:
    language = str(context.run_dir / "language")
    Scanner(Definition()).scores(COMPILED_ONCE)
    ModelScores(context.config.scores)(
        COMPILED_ONCE, "en"
    )  # a model that cannot be read is an error before the work begins
    return scan_texts(
        context,
        "score",
        lambda tallies: ScoreTexts(str(folder), tallies, definitions, language, context.config.scores),
        folder,
        logs,
    )


def _filter(context: RunContext, folder: Path, logs: Path) -> Tally:
    scores = context.run_dir / "score"
    shards, tallies = shards_of(scores), logs / "tallies"
    step = ApplyRules(str(folder), str(scores), shards, context.config.rules, str(tallies), str(logs / "progress"))
    context.pipeline("filter", logs, [step], len(shards), context.text_bytes(), alone=True)
    tally = Tally.load_all(tallies)
    count_verdicts(folder, tally)
    return tally
