"""Names that tell the documents of the sources from planted canaries, and one canary from another.

Where stages compare documents with each other, a canary meets neither documents of the sources nor another canary: the
hashes that they would meet under are salted by the canary's name. So canaries change nothing about the documents of the
sources, and no canary decides what becomes of another. What canaries are for is in `plant`.
"""

from data_pipeline.core.hashing import stable_hash

_SUFFIX = ".canaries"  # no source's name ends so: those have no dots


def canaries_of(source: str) -> str:
    """The name under which the canaries that follow the rules of `source` are counted and filed."""
    return source + _SUFFIX


def is_canary(name: str) -> bool:
    """Whether a source, or a shard `<source>/<shard>`, holds canaries."""
    return name.split("/")[0].endswith(_SUFFIX)


def source_of(name: str) -> str:
    """The source whose rules hold for `name`: itself, or the one that canaries follow."""
    return name.removesuffix(_SUFFIX)


def canary_of(shard: str) -> str:
    """The name of the canary that `shard` is of, or "" for the documents of the sources."""
    return shard.rpartition("-")[0] if is_canary(shard) else ""


def salt(shard: str) -> int:
    """64 bits to combine, by exclusive or, with the hashes of the shard's documents; 0 for those of the sources."""
    return stable_hash(canary_of(shard)) if is_canary(shard) else 0
