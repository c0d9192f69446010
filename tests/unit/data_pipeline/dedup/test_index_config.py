"""The config of an earlier run that `dedup.index` names, if it is damaged."""

from pathlib import Path

import pytest

from configs.loader import ConfigError
from data_pipeline.dedup.dedup_stages import config_of

WHOLE = "[rules.en]\nmin_words = 3\n[dedup]\nbands = 1\nrows = 2\nngram = 5\nseed = 0\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[dedup", "is not valid TOML"),
        (b"\xff\xfe", "is not UTF-8 at byte 0"),
        (
            WHOLE.replace("rows = 2\n", "").encode(),
            r"whose config\.toml is damaged: it has no dedup\.rows; restore it, or leave that run",
        ),
        (WHOLE[WHOLE.index("[dedup]") :].encode(), r"config\.toml is damaged: it has no rules"),
        (b"", r"it has no dedup\.bands"),
    ],
)
def test_a_damaged_config_is_told(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.toml").write_text(WHOLE)
    assert config_of(tmp_path)["dedup"]["rows"] == 2
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        config_of(tmp_path)
