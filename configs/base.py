"""The strict base of every config section: unknown keys, wrong types and later changes are errors."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of keys in a TOML file, `[section]`. Frozen: a run's config never changes under it.

    The string below a key is its description: one sentence, which `trivium config --explain` prints.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
