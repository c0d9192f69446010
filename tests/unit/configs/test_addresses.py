"""Addresses of object stores in configs: no credentials in them, and none where only folders can be read."""

import pytest
from pydantic import BaseModel

from configs.checkpoints import CheckpointConfig
from configs.export import ExportConfig
from configs.initial import InitConfig
from configs.loader import ConfigError, validate
from pretrain import inspection

SECRET = "planted-9f1c-secret"


@pytest.mark.parametrize("mirror", ["s3://bucket/runs/one", "/shared/mirror", "mirror", "gs://bucket/a@b"])
def test_a_mirror_is_a_folder_or_an_address(mirror: str) -> None:
    assert validate(CheckpointConfig, {"mirror": f"{mirror}/"}).mirror == mirror
    assert validate(CheckpointConfig, {"mirror": ""}).mirror is None, "an override can unset it"


@pytest.mark.parametrize(
    ("schema", "tree", "words"),
    [
        (CheckpointConfig, {"mirror": f"s3://key:{SECRET}@bucket/x"}, "credentials in the environment"),
        (CheckpointConfig, {"mirror": f"s3://bucket/x?X-Amz-Signature={SECRET}"}, "credentials in the environment"),
        (CheckpointConfig, {"mirror": f"simplecache::s3://{SECRET}/x"}, "a chain of file systems"),
        (CheckpointConfig, {"mirror": "https://host/x"}, "cannot be written to over HTTP"),
        (CheckpointConfig, {"mirror": "s3://"}, "names no folder"),
        (CheckpointConfig, {"mirror": "/"}, "names no folder"),
        (InitConfig, {"run": "s3://bucket/x"}, "init.run is the address s3://bucket/x, and models are read from"),
        (ExportConfig, {"run": f"s3://key:{SECRET}@bucket/x", "out": "out"}, "copy it to a disk first"),
    ],
)
def test_other_addresses_are_refused_and_secrets_not_repeated(
    schema: type[BaseModel], tree: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(schema, tree)
    assert words in str(raised.value) and SECRET not in str(raised.value)


def test_a_checkpoint_behind_an_address_is_not_inspected() -> None:
    with pytest.raises(ConfigError, match=r"CHECKPOINT is the address s3://bucket/x, .* `aws s3 sync ADDRESS FOLDER`"):
        inspection.main(["s3://bucket/x"])
