"""What a data run is: sources, rule sets, deduplication, the held-out split, the tokenizer and the mixture.

One TOML file names everything between raw files and a mixture plan. Rules are thresholds on named scores
(`RuleSet`); a document that breaks one is dropped with `<score>_min` or `<score>_max` as its reason. What
each score is lives with the code that computes it, in `data_pipeline.scan.scores`.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from configs.alarms import AlarmsConfig
from configs.base import Section
from configs.canaries import CanaryConfig
from configs.canaries import check as check_canaries
from configs.cuts import DecontaminateConfig, DocumentsConfig, LinesConfig, PiiConfig, SubstringsConfig
from configs.mixture import BY_SOURCE, MixtureConfig
from configs.rules import combined
from configs.scores import ScoresConfig

ANY_LANGUAGE = "any"


class SlurmConfig(Section):
    """What the array jobs ask for; `run.workers` is how many of a job's elements run at a time."""

    partition: str | None = None  # None, here and below: the cluster's default
    account: str | None = None
    qos: str | None = None
    time: str = Field(default="24:00:00", pattern=r"^(\d+-)?\d+(:\d+){0,2}$")  # of one element, as sbatch takes it
    cpus_per_task: int = Field(default=1, ge=1)
    mem_per_cpu_gb: int = Field(default=2, ge=1)
    tasks_per_job: int = Field(default=1, ge=1)  # tasks that one element works through, one after another
    max_array_size: int = Field(default=1001, ge=1)  # not above MaxArraySize of slurm.conf
    setup: str = ""  # shell commands before a task's Python starts, e.g. "module load python"


class RayConfig(Section):
    address: str | None = None  # of a running cluster, e.g. "auto"; None starts Ray on this machine, loopback only
    cpus_per_task: int = Field(default=1, ge=1)
    mem_per_cpu_gb: float = Field(default=2, gt=0)  # booked, not enforced


class RunConfig(Section):
    """Where the run lives and who does its tasks. Neither `executor` nor `workers` changes a byte of the result."""

    dir: str
    executor: Literal["local", "slurm", "ray", "mpi"] | None = None  # None: mpi under mpirun, else local
    workers: int = Field(default=2, ge=1)  # tasks at a time; under mpi it is the number of ranks instead
    slurm: SlurmConfig = SlurmConfig()
    ray: RayConfig = RayConfig()
    # Text per shard after extraction. Shards are the unit of work and of output: their cut, and so every
    # published file, depends on this number and never on the number of workers.
    shard_bytes: int = Field(default=2_000_000, ge=1)


class SourceConfig(Section):
    """One named part of the mixture: its files, their format, a rule set for each language it may hold.

    `files` are paths, globs or folders, relative to the working directory, or addresses such as s3://bucket/folder; a
    folder is searched for files of the format. Files may be compressed with gzip or Zstandard. Credentials never
    belong here: they come from the environment or fsspec's own configuration.
    """

    files: tuple[str, ...] = Field(min_length=1)
    # jsonl, parquet: a record a line or row; warc: a page a record; text, html, code: a document a file.
    format: Literal["jsonl", "warc", "parquet", "text", "html", "code"]
    rules: dict[str, str] = Field(min_length=1)  # language code of lid.176, or "any", to a name under [rules]
    # For jsonl and parquet. A record without an id is named after its file and line.
    text_key: str = "text"
    id_key: str = "id"
    url_key: str = "url"
    # Which files of a searched folder are taken, such as [".py", ".go"]; empty for all that the format knows.
    extensions: tuple[str, ...] = ()
    # For code: leave out folders of other people's code (node_modules, vendor...), of built code (build, dist...).
    skip_vendored: bool = False
    skip_generated: bool = False

    @model_validator(mode="after")
    def _keys_fit_the_format(self) -> "SourceConfig":
        records = self.format in ("jsonl", "parquet")
        for key, default in (("text_key", "text"), ("id_key", "id"), ("url_key", "url")):
            if getattr(self, key) != default and not records:
                raise ValueError(f"{key} = {getattr(self, key)!r} says nothing of format {self.format!r}; leave it out")
        for key in ("skip_vendored", "skip_generated"):
            if getattr(self, key) and self.format != "code":
                raise ValueError(f"{key} is for format 'code', not {self.format!r}; leave it out")
        for ending in self.extensions:
            if not ending.startswith(".") or ending != ending.lower():
                raise ValueError(f"extensions: {ending!r} should be in lower case with its dot, as in '.py'")
        for path in self.files:
            scheme, separator, rest = path.partition("://")
            query = scheme.lower() in ("http", "https") and "?" in rest
            if separator and ("@" in rest.split("/")[0] or query or "x-amz-" in rest.lower() or "::" in path):
                # Not shown: what comes before the @, or behind the ?, is a secret.
                raise ValueError(
                    f"files: an address with {scheme}:// holds credentials, a query or a chain of file systems; give "
                    "the plain address, and the credentials in the environment"
                )
        return self

    def rule_set(self, language: str) -> str | None:
        """The name of the rule set for a document; None when the source does not expect its language."""
        return self.rules.get(language, self.rules.get(ANY_LANGUAGE))


class BlocklistConfig(Section):
    """Files of unwanted URLs, one entry a line, `#` for comments, gzipped or not; local.

    Lists such as UT1 (dsi.ut-capitole.fr/blacklists) are in this form. Pages that match are dropped as blocked_url.
    """

    domains: tuple[str, ...] = ()  # example.com: that host and every host below it
    hosts: tuple[str, ...] = ()  # www.example.com: that host alone
    prefixes: tuple[str, ...] = ()  # example.com/forum: that path and what lies below it, on that host


class ExtractConfig(Section):
    # Above this share of broken records (bad JSON, no text, cut gzip members...) in a source the run stops.
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    repair: bool = True  # ftfy: mojibake, stray control characters, line ends
    extractor: Literal["resiliparse", "trafilatura"] = "resiliparse"  # asked first; the other where it finds nothing
    blocklist: BlocklistConfig = BlocklistConfig()
    # Processor time that a page of many tags may take; what is beyond all measure is set aside before it takes any.
    seconds_per_page: int = Field(default=60, ge=1)
    # A longer line, page or file is set aside and never held in memory.
    max_record_bytes: int = Field(default=16_000_000, ge=1_000)
    # What a gzip member or Zstandard frame of over 1 MiB of content may hold for each byte of it; prose is at 3 to 10.
    max_expansion: float = Field(default=200.0, gt=1)
    max_expanded_bytes: int = Field(default=200_000_000_000, ge=1_000_000)  # what a whole file may hold


class LanguageConfig(Section):
    max_chars: int = Field(default=10_000, ge=100)  # only this much of a document is shown to the model
    # Label every paragraph too, for the score language_share: characters in paragraphs of the document's own language.
    paragraphs: bool = False
    min_paragraph_chars: int = Field(default=100, ge=1)  # shorter ones are taken to be in the document's language


class Bound(Section):
    """What a score may be, ends included."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> "Bound":
        if self.min is None and self.max is None:
            raise ValueError("a rule needs min, max or both; leave the rule out to switch it off")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min = {self.min} is above max = {self.max}; swap them")
        return self


class RuleSet(Section):
    """Thresholds by score name; a score without a bound is kept beside the text and decides nothing.

    `use` takes published sets of rules.toml; keys written beside it count more, and `without` switches rules off.
    """

    use: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    splitter: Literal["spaces", "words", "cjk"] = "spaces"
    stop_words: tuple[str, ...] = ()
    c4: Literal["paper", "reference", "datatrove", "fineweb"] = "datatrove"  # the form of C4's line rules
    bad_words_file: str = ""  # one a line
    drop_lines: tuple[Literal["c4", "refinedweb"], ...] = ()  # whose line rules are applied to the documents kept

    language_score: Bound | None = None
    language_share: Bound | None = None  # with language.paragraphs
    word_count: Bound | None = None
    mean_word_length: Bound | None = None
    hash_ratio: Bound | None = None
    ellipsis_ratio: Bound | None = None
    bullet_line_ratio: Bound | None = None
    ellipsis_line_ratio: Bound | None = None
    alpha_word_ratio: Bound | None = None
    stop_word_count: Bound | None = None
    stop_word_total: Bound | None = None
    dup_line_ratio: Bound | None = None
    dup_line_char_ratio: Bound | None = None
    dup_para_ratio: Bound | None = None
    dup_para_char_ratio: Bound | None = None
    top_2_gram: Bound | None = None
    top_3_gram: Bound | None = None
    top_4_gram: Bound | None = None
    dup_5_gram: Bound | None = None
    dup_6_gram: Bound | None = None
    dup_7_gram: Bound | None = None
    dup_8_gram: Bound | None = None
    dup_9_gram: Bound | None = None
    dup_10_gram: Bound | None = None
    line_punct_ratio: Bound | None = None
    short_line_ratio: Bound | None = None
    char_dup_ratio: Bound | None = None
    newline_ratio: Bound | None = None
    mean_line_length: Bound | None = None
    max_line_length: Bound | None = None
    alnum_ratio: Bound | None = None
    generated_markers: Bound | None = None
    licence_markers: Bound | None = None
    c4_lorem_ipsum: Bound | None = None
    c4_curly_bracket: Bound | None = None
    c4_sentences: Bound | None = None
    refinedweb_word_ratio: Bound | None = None
    bad_words: Bound | None = None
    classifier_score: Bound | None = None  # this and those below: with their model under [scores]
    unigram_logprob: Bound | None = None
    perplexity: Bound | None = None

    @model_validator(mode="before")
    @classmethod
    def _use(cls, own: Any) -> Any:
        if not isinstance(own, dict):
            return own
        # What leaves here is validated as Python values, no longer as JSON: lists have to be tuples.
        keys = combined(own.get("use") or (), own)
        return {name: tuple(value) if isinstance(value, list) else value for name, value in keys.items()}

    @model_validator(mode="after")
    def _sound(self) -> "RuleSet":
        for name in self.without:
            if not isinstance(getattr(self, name, None), Bound):
                raise ValueError(f"without = {name!r} is no rule of this set; it has {', '.join(self.bounds())}")
        if "bad_words" in self.bounds() and not self.bad_words_file:
            raise ValueError(
                "the rule bad_words needs bad_words_file, a list with a word or phrase on each line; "
                'name one, or add without = ["bad_words"]'
            )
        return self

    def bounds(self) -> dict[str, Bound]:
        """The rules that are on, in the order in which they are tried."""
        return {
            name: value
            for name in type(self).model_fields
            if name not in self.without and isinstance(value := getattr(self, name), Bound)
        }


class DedupConfig(Section):
    """MinHash after FineWeb: `bands` x `rows` 64-bit hashes over word n-grams (2n characters in CJK text)."""

    exact: bool = True
    url: bool = False  # documents of one address are one, however they differ
    minhash: bool = True
    bands: int = Field(default=14, ge=1)
    rows: int = Field(default=8, ge=1)
    ngram: int = Field(default=5, ge=1)
    seed: int = Field(default=1, ge=0)
    verify: float | None = Field(default=None, gt=0, le=1)  # least true Jaccard similarity of near-duplicates
    index: tuple[str, ...] = ()  # run.dir of earlier runs, whose documents are dropped here
    memory_mb: int = Field(default=1024, ge=1)  # of one task

    @model_validator(mode="after")
    def _together(self) -> "DedupConfig":
        if self.verify is not None and self.index:
            raise ValueError(
                f"dedup.verify = {self.verify} compares texts, and dedup.index has keys alone; leave one of them out"
            )
        return self


class HeldoutConfig(Section):
    """A document is held out when the hash of (seed, its id) is under `share`; each source gives one."""

    share: float = Field(default=0.02, gt=0, lt=0.5)
    seed: int = Field(default=0, ge=0)


class TokenizerConfig(Section):
    """sentencepiece BPE with byte fallback, trained on up to `train_bytes` of text, all sources together."""

    vocab_size: int = Field(default=8192, ge=300)
    train_bytes: int = Field(default=8_000_000, ge=1)
    character_coverage: float = Field(default=0.9995, gt=0, le=1)
    max_piece_length: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0)


class DataConfig(Section):
    run: RunConfig
    sources: dict[str, SourceConfig] = Field(min_length=1)
    rules: dict[str, RuleSet] = Field(min_length=1)
    extract: ExtractConfig = ExtractConfig()
    language: LanguageConfig = LanguageConfig()
    scores: ScoresConfig = ScoresConfig()
    dedup: DedupConfig = DedupConfig()
    decontaminate: DecontaminateConfig | None = None
    lines: LinesConfig | None = None
    substrings: SubstringsConfig | None = None
    pii: PiiConfig | None = None
    documents: DocumentsConfig = DocumentsConfig()
    heldout: HeldoutConfig = HeldoutConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    mixture: MixtureConfig
    alarms: AlarmsConfig = AlarmsConfig()
    canaries: dict[str, CanaryConfig] = Field(default={})

    @model_validator(mode="after")
    def _names_meet(self) -> "DataConfig":
        for name, source in self.sources.items():
            if not name.isidentifier():
                raise ValueError(f"source name {name!r} becomes a folder: use letters, digits and _ only")
            for language, rules in source.rules.items():
                if rules not in self.rules:
                    raise ValueError(
                        f"sources.{name}.rules.{language} = {rules!r} is no rule set; "
                        f"known under [rules]: {', '.join(sorted(self.rules))}"
                    )
        plans = {f"mixture.stages.{name}" if name else "mixture": plan for name, plan in self.mixture.plans().items()}
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
            if not name.isidentifier():
                raise ValueError(f"canary name {name!r} becomes part of ids: use letters, digits and _ only")
        check_canaries(self)
        return self
