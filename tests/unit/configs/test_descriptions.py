"""Every config key has a description of one sentence."""

from collections.abc import Iterator

import pytest

from configs.data import DataConfig
from configs.export import ExportConfig
from configs.rl import GRPOConfig
from configs.section import Section
from configs.sft import SFTConfig
from configs.train import PretrainConfig


def sections(annotation: object) -> Iterator[type[Section]]:
    """Yields the sections that a type contains, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
        for field in annotation.model_fields.values():
            yield from sections(field.annotation)
    for inner in getattr(annotation, "__args__", ()):
        yield from sections(inner)


@pytest.mark.parametrize("schema", [PretrainConfig, DataConfig, SFTConfig, GRPOConfig, ExportConfig])
def test_every_key_has_a_sentence(schema: type[Section]) -> None:
    wrong = {
        f"{section.__name__}.{key}": field.description
        for section in sections(schema)
        for key, field in section.model_fields.items()
        if not (field.description or "").endswith(".")
    }
    assert not wrong, f"give each a docstring of one sentence on the line below it: {wrong}"
