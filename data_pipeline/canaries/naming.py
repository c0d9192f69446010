"""Whose documents these are: of the sources, or planted by the run as canaries, each canary a realm of its own.

Documents of different realms never meet where stages compare documents with each other: the hashes that they would
meet under differ by the realm. So canaries change nothing about the documents of the sources, and no canary decides
what becomes of another. What canaries are for is in `plant`.
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


def realm(shard: str) -> str:
    """ "" for the documents of the sources, which all belong together; else a name of the canary that `shard` is of."""
    return shard.rpartition("-")[0] if is_canary(shard) else ""


def salt(shard: str) -> int:
    """64 bits to be added, by exclusive or, to hashes of the shard's documents; 0 for those of the sources."""
    return stable_hash(realm(shard)) if is_canary(shard) else 0
