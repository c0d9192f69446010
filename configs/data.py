"""What a data run is: sources, rule sets, deduplication, the held-out split, the tokenizer and the mixture.

One TOML file names everything between raw files and a mixture plan. A document that breaks a rule (`configs.rules`) is
dropped with `<score>_min` or `<score>_max` as its reason.
"""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from configs.alarms import AlarmsConfig
from configs.base import Section
from configs.canaries import CanaryConfig
from configs.canaries import check as check_canaries
from configs.cuts import DecontaminateConfig, DocumentsConfig, LinesConfig, PiiConfig, SubstringsConfig
from configs.loader import ConfigError
from configs.mixture import BY_SOURCE, MixtureConfig, PlanConfig
from configs.rules import RuleSet
from configs.scores import ScoresConfig

ANY_LANGUAGE = "any"


class SlurmConfig(Section):
    """What the array jobs ask for under executor = "slurm". `run.workers` of a job's elements run at a time."""

    partition: str | None = None
    """The partition, as in sbatch --partition; left out, the cluster's default."""
    account: str | None = None
    """The account that is charged, as in sbatch --account; left out, the cluster's default."""
    qos: str | None = None
    """The quality of service, as in sbatch --qos; left out, the cluster's default."""
    time: str = "24:00:00"
    """The time limit of one element of a job, as sbatch takes it: HH:MM:SS or D-HH:MM:SS."""
    cpus_per_task: int = Field(default=1, ge=1)
    """The cores of one element."""
    mem_per_cpu_gb: int = Field(default=2, ge=1)
    """The memory of an element for each of its cores, in GiB."""
    tasks_per_job: int = Field(default=1, ge=1)
    """The number of tasks that one element works through, one after another."""
    max_array_size: int = Field(default=1001, ge=1)
    """The most elements of one job, not above MaxArraySize of slurm.conf."""
    setup: str = ""
    """Shell commands before a task's Python starts, such as "module load python"; empty for none."""

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, time: str) -> str:
        if not re.fullmatch(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", time):
            raise ValueError(f'{time!r} is no time limit of sbatch; write hours as "24:00:00" or days as "2-12:00:00"')
        return time


class RayConfig(Section):
    """Which Ray does the tasks under executor = "ray", and what each of them books there."""

    address: str | None = None
    """The address of a running cluster, such as "auto"; left out, Ray starts on this machine, on loopback only."""
    cpus_per_task: int = Field(default=1, ge=1)
    """The cores that a task books."""
    mem_per_cpu_gb: float = Field(default=2, gt=0)
    """The memory that a task books for each of its cores, in GiB; Ray does not enforce it."""


class DataRunConfig(Section):
    """Where the run lives and who does its tasks. Neither `executor` nor `workers` changes a byte of the result."""

    dir: str
    """The folder that all stages write into, relative to the working directory."""
    executor: Literal["local", "slurm", "ray", "mpi"] | None = None
    """Who does the tasks; left out, mpi under mpirun and local otherwise."""
    workers: int = Field(default=2, ge=1)
    """The number of tasks at a time; under mpi it is the number of ranks instead."""
    slurm: SlurmConfig = SlurmConfig()
    """What the array jobs ask for under executor = "slurm"."""
    ray: RayConfig = RayConfig()
    """Which Ray does the tasks under executor = "ray"."""
    shard_bytes: int = Field(default=2_000_000, ge=1)
    """The bytes of text in a shard, the unit of work; the files' cut depends on it, and never on workers."""


class SourceConfig(Section):
    """One named part of the mixture: its files, their format, a rule set for each language it may hold.

    Files may be compressed with gzip or Zstandard. Credentials never belong here: they come from the environment or
    fsspec's own configuration.
    """

    files: tuple[str, ...] = Field(min_length=1)
    """Paths, globs or folders, relative to the working directory, or addresses such as s3://bucket/folder."""
    format: Literal["jsonl", "warc", "parquet", "text", "html", "code"]
    """What is a document: a line or row (jsonl, parquet), a page (warc), or a file (html, code, text if not lines)."""
    rules: dict[str, str] = Field(min_length=1)
    """A name under [rules] for each language, by its code in lid.176 or "any"; other languages are dropped."""
    text_key: str = "text"
    """The key or column of a record that holds the text (jsonl, parquet); in nested ones a path such as "a.b"."""
    id_key: str = "id"
    """The key or column that holds the id (jsonl, parquet); a record without it is named after file and line."""
    url_key: str = "url"
    """The key or column that holds the address (jsonl, parquet)."""
    metadata_key: str = "metadata"
    """The key or column of an object that is carried along as metadata.record (jsonl, parquet)."""
    fields: Literal["all"] | tuple[str, ...] = "all"
    """The other keys or columns that are carried along, under metadata.fields (jsonl, parquet); [] for none."""
    encoding: str = "utf-8"
    """The encoding of files of text or code, by its name on the web, such as windows-1251; a byte order mark wins."""
    document_per: Literal["file", "line"] = "file"
    """Whether a file of text is one document, or every line of it that is not blank is one."""
    extensions: tuple[str, ...] = ()
    """The endings of the files that are taken from a folder, such as [".py", ".go"]; empty for all of the format."""
    skip_vendored: bool = False
    """Whether folders of other people's code (node_modules, vendor...) are left out (code)."""
    skip_generated: bool = False
    """Whether folders of built code (build, dist...) are left out (code)."""

    @model_validator(mode="after")
    def _keys_fit_the_format(self) -> "SourceConfig":
        records = self.format in ("jsonl", "parquet")
        for key in ("text_key", "id_key", "url_key", "metadata_key", "fields"):
            if getattr(self, key) != type(self).model_fields[key].default and not records:
                raise ValueError(f"{key} = {getattr(self, key)!r} says nothing of format {self.format!r}; leave it out")
        if self.encoding != "utf-8" and self.format not in ("text", "code"):
            raise ValueError(
                f"encoding = {self.encoding!r} is for the formats 'text' and 'code', not {self.format!r}, which says "
                "what its encoding is, or is UTF-8; leave it out"
            )
        if self.document_per != "file" and self.format != "text":
            raise ValueError(f"document_per = 'line' is for format 'text', not {self.format!r}; leave it out")
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

    domains: tuple[str, ...] = ()
    """Files of domains: example.com stands for that host and every host below it."""
    hosts: tuple[str, ...] = ()
    """Files of hosts: www.example.com stands for that host alone."""
    prefixes: tuple[str, ...] = ()
    """Files of addresses: example.com/forum stands for that path, and what lies below it, on that host."""


class ExtractConfig(Section):
    """How files become texts, and what is set aside because it is broken or too large."""

    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """The share of a source's records that may be broken (bad JSON, no text, cut files); above it the run stops."""
    repair: bool = True
    """Whether ftfy repairs wrongly decoded characters, stray control characters and line ends."""
    extractor: Literal["resiliparse", "trafilatura"] = "resiliparse"
    """What finds the main text of a page first; the other is asked where it finds nothing."""
    blocklist: BlocklistConfig = BlocklistConfig()
    """Addresses whose pages are dropped."""
    seconds_per_page: int = Field(default=60, ge=1)
    """The processor time, in seconds, that extraction of a page of many tags may take."""
    max_record_bytes: int = Field(default=16_000_000, ge=1_000)
    """The most bytes of a line, page or file; a longer one is set aside and never held in memory."""
    max_undecoded_share: float = Field(default=0.02, ge=0, le=1)
    """The share of a page's characters that its encoding may leave undecoded (U+FFFD); above it the page is broken."""
    max_fields_bytes: int = Field(default=10_000, ge=0)
    """The bytes of JSON that a record's other fields may come to; a field beyond that is left out and counted."""
    max_expansion: float = Field(default=200.0, gt=1)
    """The most bytes of content for each compressed byte, of over 1 MiB of content; prose is at 3 to 10."""
    max_expanded_bytes: int = Field(default=200_000_000_000, ge=1_000_000)
    """The most bytes of content of one compressed file."""


class LanguageConfig(Section):
    """How the language of a document is found."""

    max_chars: int = Field(default=10_000, ge=100)
    """The number of a document's first characters that the model is shown."""
    paragraphs: bool = False
    """Whether every paragraph is labelled too, for the score language_share."""
    min_paragraph_chars: int = Field(default=100, ge=1)
    """The characters below which a paragraph is taken to be in the document's language."""


class DedupConfig(Section):
    """MinHash after FineWeb: `bands` x `rows` 64-bit hashes over word n-grams (2n characters in CJK text)."""

    exact: bool = True
    """Whether documents of the same text, but for case and white space, are one."""
    url: bool = False
    """Whether documents of one address are one, however they differ."""
    minhash: bool = True
    """Whether near-duplicates are found by MinHash; the keys below are for that."""
    bands: int = Field(default=14, ge=1)
    """The number of bands; documents that agree in all rows of one band meet."""
    rows: int = Field(default=8, ge=1)
    """The number of hashes in a band; more of them ask for more similarity."""
    ngram: int = Field(default=5, ge=1)
    """The length of an n-gram in words, or in pairs of characters in CJK text."""
    seed: int = Field(default=1, ge=0)
    """The seed of the hash functions."""
    verify: float | Literal[False] = 0.75
    """The least true Jaccard similarity of a near-duplicate to the document that stays in its place; with false, all
    documents that meet, directly or through others, count as near-duplicates without a look at their texts."""
    index: tuple[str, ...] = ()
    """The run.dir of earlier runs, whose documents are dropped here."""
    memory_mb: int = Field(default=1024, ge=1)
    """The memory of one task that looks for duplicates, in MiB."""

    @field_validator("verify", mode="before")
    @classmethod
    def _similarity(cls, value: object) -> object:
        if value is False or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1):
            return value
        raise ValueError(
            f"{value!r} is no similarity above 0 and up to 1; say for instance 0.75, or false to compare no texts"
        )


class HeldoutConfig(Section):
    """Which documents are never trained on: those whose hash of (seed, id) is low.

    Each source of two documents or more gives one at least.
    """

    share: float = Field(default=0.02, ge=0, lt=0.5)
    """The share of each source's documents that is held out; 0 holds out none, and nothing is evaluated then."""
    seed: int = Field(default=0, ge=0)
    """The seed of the hash; another one holds out other documents."""


class TokenizerConfig(Section):
    """A sentencepiece BPE tokenizer with byte fallback, trained on a sample of all sources together."""

    vocab_size: int = Field(default=8192, ge=300)
    """The number of tokens, control symbols and bytes among them."""
    train_bytes: int = Field(default=8_000_000, ge=1)
    """The most bytes of text that it is trained on."""
    character_coverage: float = Field(default=0.9995, gt=0, le=1)
    """The share of the text's characters that get a token of their own; the rest is written in bytes."""
    max_piece_length: int = Field(default=16, ge=1)
    """The most characters of one token."""
    seed: int = Field(default=0, ge=0)
    """The seed of the sample of text."""


class DataConfig(Section):
    """The root of a data run's config."""

    run: DataRunConfig
    """Where the run lives and who does its tasks."""
    sources: dict[str, SourceConfig] = Field(min_length=1)
    """What is read, by a name for each source that the mixture and the folders use."""
    rules: dict[str, RuleSet] = Field(min_length=1)
    """Thresholds that documents have to meet, by a name for each set that sources refer to."""
    extract: ExtractConfig = ExtractConfig()
    """How files become texts."""
    language: LanguageConfig = LanguageConfig()
    """How the language of a document is found."""
    scores: ScoresConfig = ScoresConfig()
    """Models that score documents."""
    dedup: DedupConfig = DedupConfig()
    """Which documents are duplicates of others."""
    decontaminate: DecontaminateConfig | None = None
    """Evaluation texts that no document may hold; left out, none are looked for."""
    lines: LinesConfig | None = None
    """Lines or paragraphs cut because they are repeated across documents; left out, none are."""
    substrings: SubstringsConfig | None = None
    """Substrings cut because they are repeated across documents; left out, none are."""
    pii: PiiConfig | None = None
    """Personal data, keys and tokens that are replaced; left out, none are."""
    documents: DocumentsConfig = DocumentsConfig()
    """What is published of texts that were cut."""
    heldout: HeldoutConfig = HeldoutConfig()
    """Which documents are never trained on."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer that is trained."""
    mixture: MixtureConfig | None = None
    """What training rows are made of; needed by the plan stage alone."""
    alarms: AlarmsConfig = AlarmsConfig()
    """Which counts of a run are a warning."""
    canaries: dict[str, CanaryConfig] = Field(default={})
    """Texts of known fate that the run plants in its input, by a name for each."""

    def plans(self) -> dict[str, PlanConfig]:
        """The plans of the mixture, by name of their stage. Errors: ConfigError where there is no mixture."""
        if self.mixture is None:
            raise ConfigError(
                "key 'mixture' is missing, which says what a plan is made of: set mixture.weights, mixture.temperature "
                "or mixture.unimax, or end before the plan, by `trivium data run CONFIG --until tokens`"
            )
        return self.mixture.plans()

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
            if not name.isidentifier():
                raise ValueError(f"canary name {name!r} becomes part of ids: use letters, digits and _ only")
        check_canaries(self)
        return self
