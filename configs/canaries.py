"""Canaries of a data run: texts with a known fate that the run plants in its own input and checks at its end.

Which fates are possible follows from the rest of the config; a reason that no stage can give is an error.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Protocol

from pydantic import Field, model_validator

from configs.cuts import DecontaminateConfig, LinesConfig, PiiConfig, SubstringsConfig
from configs.dedup import DedupConfig
from configs.rules import RuleSet
from configs.section import Section
from configs.sources import ExtractConfig, SourceConfig

KEPT = "kept"  # no stage drops or cuts it
DUPLICATES = ("exact_duplicate", "near_duplicate", "url_duplicate")  # of a canary's texts, all but one are dropped
REPEATS = ("duplicate_line", "duplicate_paragraph", "duplicate_substring")  # at least one of a canary's texts is cut
_OF_PAGES = ("no_main_text", "too_complex")


class CanaryConfig(Section):
    """Canary of one text, or of several that belong together, such as duplicates.

    They are compared with each other, never with the source's own documents, and do not reach the published documents,
    tokens and plan.
    """

    source: str
    """The name under [sources] of the source that the texts are planted in, whose rules they follow."""
    text: str | tuple[str, ...]
    """The text that is planted, or a list of texts, such as duplicates of each other."""
    html: bool = False
    """Whether the text is an HTML page, of which the main text is extracted."""
    url: str = ""
    """The address that the text gets, for extract.blocklist or dedup.url; empty for none."""
    reason: str = Field(min_length=1)
    """The reason why every text must be dropped or cut (of duplicates one stays), or "kept" if none may be."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The planted texts, also if `text` is a single one."""
        return (self.text,) if isinstance(self.text, str) else self.text

    @model_validator(mode="after")
    def _enough(self) -> "CanaryConfig":
        if not self.texts:
            raise ValueError("text = [] plants nothing; give one text at least")
        if self.reason in DUPLICATES and len(self.texts) < 2:
            raise ValueError(f"reason = {self.reason!r} takes two documents; give text = [ONE, ANOTHER]")
        return self


class CanarySections(Protocol):
    """The sections of a data config that decide whether a canary can be caught; a `DataConfig` has them all."""

    @property
    def canaries(self) -> Mapping[str, CanaryConfig]: ...

    @property
    def sources(self) -> Mapping[str, SourceConfig]: ...

    @property
    def rules(self) -> Mapping[str, RuleSet]: ...

    @property
    def extract(self) -> ExtractConfig: ...

    @property
    def dedup(self) -> DedupConfig: ...

    @property
    def decontaminate(self) -> DecontaminateConfig | None: ...

    @property
    def lines(self) -> LinesConfig | None: ...

    @property
    def substrings(self) -> SubstringsConfig | None: ...

    @property
    def pii(self) -> PiiConfig | None: ...


def check(config: CanarySections) -> None:
    """Raises ValueError for a canary whose source does not exist or whose reason no rule or stage can give."""
    for name, canary in config.canaries.items():
        if canary.source not in config.sources:
            raise ValueError(
                f"canaries.{name}.source = {canary.source!r}: there is no such source; known under [sources]: "
                f"{', '.join(sorted(config.sources))}"
            )
        known = sorted(reasons(config, canary))
        if canary.reason not in known and not canary.reason.startswith(_line_rules(config, canary.source)):
            close = difflib.get_close_matches(canary.reason, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"possible are: {', '.join(known)}"
            raise ValueError(
                f"canaries.{name}.reason = {canary.reason!r}: no rule or stage that is on drops or cuts documents of "
                f"{canary.source} for that; {hint}"
            )


def reasons(config: CanarySections, canary: CanaryConfig) -> Iterator[str]:
    """Yields the reasons for which a canary can be dropped or cut, and "kept".

    Reasons of the line rules (`_line_rules`) are not among them.
    """
    source = config.sources[canary.source]
    yield from (KEPT, "empty", "one_character", *(_OF_PAGES if canary.html else ()))
    if "any" not in source.rules:
        yield "language_unexpected"
    blocklist = config.extract.blocklist
    if canary.url and (blocklist.domains or blocklist.hosts or blocklist.prefixes):
        yield "blocked_url"
    for rules in source.rules.values():
        for score, bound in config.rules[rules].bounds().items():
            yield from (f"{score}_{side}" for side in ("min", "max") if getattr(bound, side) is not None)
    dedup, lines, pii = config.dedup, config.lines, config.pii
    if len(canary.texts) > 1:
        on = {"exact_duplicate": dedup.exact, "near_duplicate": dedup.minhash, "url_duplicate": dedup.url}
        yield from (reason for reason, wanted in on.items() if wanted)
    if config.decontaminate and config.decontaminate.enabled:
        yield "contaminated"
    if lines and lines.enabled and _takes_part(lines.sources, canary.source):
        yield f"duplicate_{lines.unit}"
    if config.substrings and config.substrings.enabled and _takes_part(config.substrings.sources, canary.source):
        yield "duplicate_substring"
    if pii and pii.enabled:
        yield from (f"pii_{kind}" for kind in pii.actions)
    yield "mostly_cut"


def _takes_part(sources: tuple[str, ...] | None, source: str) -> bool:
    return sources is None or source in sources


def _line_rules(config: CanarySections, source: str) -> tuple[str, ...]:
    """Prefixes of the reasons for which a source's web lines are cut, such as c4_."""
    sets = (config.rules[rules] for rules in config.sources[source].rules.values())
    return tuple(f"{which}_" for rules in sets for which in rules.drop_lines)
