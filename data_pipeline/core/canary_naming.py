"""Names that distinguish canaries from the documents of sources, and one canary from another.

Stages that compare documents by hashes never match a canary with a source's document or with another canary, since its
hashes are salted with its name. Canaries therefore change nothing about the sources' documents, nor each other's
fate. `canaries.plant` explains what canaries are for.
"""

from data_pipeline.core.hashing import stable_hash

_SUFFIX = ".canaries"  # cannot end the name of a source, which has no dots


def canaries_of(source: str) -> str:
    """Returns the name by which the canaries of a source are counted and their folders are called."""
    return source + _SUFFIX


def is_canary(name: str) -> bool:
    """Whether a source, or a shard `<source>/<shard>`, holds canaries."""
    return name.split("/")[0].endswith(_SUFFIX)


def source_of(name: str) -> str:
    """Returns the source whose rules apply to `name`, which is a source or a name made by `canaries_of`."""
    return name.removesuffix(_SUFFIX)


def canary_of(shard: str) -> str:
    """Returns the name of the canary that a shard holds, "" for a shard of a source's documents."""
    return shard.rpartition("-")[0] if is_canary(shard) else ""


def salt(shard: str) -> int:
    """Returns 64 bits to XOR with the hashes of a shard's documents; 0 for a shard of a source's documents."""
    return stable_hash(canary_of(shard)) if is_canary(shard) else 0
