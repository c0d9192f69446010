"""Config of a data run: sources, rule sets, deduplication, the held-out split, the tokenizer and the mixture.

One TOML file describes everything from raw files to a mixture plan. A document that breaks a rule (`configs.rules`) is
dropped with `<score>_min` or `<score>_max` as its reason.
"""

from pydantic import Field, model_validator

from configs.alarms import AlarmsConfig
from configs.canaries import CanaryConfig
from configs.canaries import check as check_canaries
from configs.cuts import DecontaminateConfig, DocumentsConfig, LinesConfig, PiiConfig, SubstringsConfig
from configs.data_run import DataRunConfig
from configs.dedup import DedupConfig
from configs.loader import ConfigError
from configs.mixture import BY_SOURCE, MixtureConfig, PlanConfig
from configs.model_scores import ScoresConfig
from configs.rules import RuleSet
from configs.section import Section, check_name
from configs.sources import RESERVED, ExtractConfig, LanguageConfig, SourceConfig
from configs.tokenizer import TokenizerConfig


class HeldoutConfig(Section):
    """Held-out documents, which are never trained on: those whose hash of (seed, id) is low.

    At least one document of each source is held out, if the source has two or more.
    """

    share: float = Field(default=0.02, ge=0, lt=0.5)
    """The share of each source's documents that is held out; with 0, nothing is held out or evaluated."""
    seed: int = Field(default=0, ge=0)
    """The seed of the hash; another seed holds out other documents."""


class DataConfig(Section):
    """The root of a data run's config."""

    run: DataRunConfig
    """The run's folder, and the executor of its tasks."""
    sources: dict[str, SourceConfig] = Field(min_length=1)
    """The sources that are read, by name; the mixture and the output folders use these names."""
    rules: dict[str, RuleSet] = Field(min_length=1)
    """Sets of thresholds that documents must meet, by name; sources refer to these names."""
    extract: ExtractConfig = ExtractConfig()
    """Extraction of texts from files."""
    language: LanguageConfig = LanguageConfig()
    """Identification of a document's language."""
    scores: ScoresConfig = ScoresConfig()
    """Models that score documents."""
    dedup: DedupConfig = DedupConfig()
    """Removal of duplicate documents."""
    decontaminate: DecontaminateConfig | None = None
    """Evaluation texts that no document may contain; left out, none are looked for."""
    lines: LinesConfig | None = None
    """Lines or paragraphs cut because they are repeated across documents; left out, none are."""
    substrings: SubstringsConfig | None = None
    """Substrings cut because they are repeated across documents; left out, none are."""
    pii: PiiConfig | None = None
    """Personal data and credentials that are replaced; left out, none are."""
    documents: DocumentsConfig = DocumentsConfig()
    """Limits beyond which a document that stages have cut is dropped."""
    heldout: HeldoutConfig = HeldoutConfig()
    """Held-out documents, which are never trained on."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer that is trained."""
    mixture: MixtureConfig | None = None
    """The training rows' sources and lengths; only the plan stage needs it."""
    alarms: AlarmsConfig = AlarmsConfig()
    """Limits beyond which a stage's counts cause a warning."""
    canaries: dict[str, CanaryConfig] = Field(default={})
    """Texts of known fate that the run plants in its input, by name."""

    def plans(self) -> dict[str, PlanConfig]:
        """Returns the plans of the mixture, by name of their stage. Raises ConfigError if there is no [mixture]."""
        if self.mixture is None:
            raise ConfigError(
                "key 'mixture' is missing, which says what a plan is made of: set mixture.weights, mixture.temperature "
                "or mixture.unimax, or end before the plan, by `trivium data run CONFIG --until tokens`"
            )
        return self.mixture.plans()

    @model_validator(mode="after")
    def _names_meet(self) -> "DataConfig":
        for name, source in self.sources.items():
            check_name("source", name, taken=RESERVED)
            for language, rules in source.rules.items():
                if rules not in self.rules:
                    raise ValueError(
                        f"sources.{name}.rules.{language} = {rules!r} is no rule set; "
                        f"known under [rules]: {', '.join(sorted(self.rules))}"
                    )
        mixture = self.mixture.plans() if self.mixture else {}
        plans = {f"mixture.stages.{name}" if name else "mixture": plan for name, plan in mixture.items()}
        named = {
            **{f"{key}.{part}": getattr(plan, part) for key, plan in plans.items() for part in BY_SOURCE},
            "lines.sources": self.lines and self.lines.sources,
            "substrings.sources": self.substrings and self.substrings.sources,
        }
        for key, names in named.items():
            for name in names or ():
                if name not in self.sources:
                    raise ValueError(
                        f"{key}.{name}: there is no such source; known under [sources]: "
                        f"{', '.join(sorted(self.sources))}"
                    )
        for key, plan in plans.items():
            for part in ("epochs", "fim"):
                for name in getattr(plan, part):
                    if plan.weights is not None and name not in plan.weights:
                        raise ValueError(
                            f"{key}.{part}.{name}: {key}.weights leaves this source out; take out the key as well"
                        )
        return self

    @model_validator(mode="after")
    def _scores_exist(self) -> "DataConfig":
        for name, rules in self.rules.items():
            for score in rules.bounds():
                if key := self.scores.missing(score):
                    raise ValueError(
                        f"rules.{name}.{score} bounds a score of a model that is not configured; name the model as "
                        f"scores.{key} = PATH, or leave the rule out"
                    )
            if "language_share" in rules.bounds() and not self.language.paragraphs:
                raise ValueError(
                    f"rules.{name}.language_share needs the languages of paragraphs; set language.paragraphs = true, "
                    "or leave the rule out"
                )
        return self

    @model_validator(mode="after")
    def _canaries_can_be_caught(self) -> "DataConfig":
        for name in self.canaries:
            check_name("canary", name, "part of ids")
        check_canaries(self)
        return self
