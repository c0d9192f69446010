"""Config of trackers: services and files, besides metrics.jsonl, that get the numbers of a training run.

Keys and passwords are not part of it, since the config is written into the run's folder, its checkpoints and the
tracker itself. The trackers' libraries read them from the environment.
"""

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from configs.section import Section

# The variables, by section, that the tracker's library reads its keys from.
VARIABLES = {
    "wandb": "WANDB_API_KEY",
    "mlflow": "MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "otel": "OTEL_EXPORTER_OTLP_HEADERS",
}
_SECRET_KEY = re.compile(r"key|token|passw|secret|header|auth|credential", re.IGNORECASE)


class _Tracker(Section):
    """Base of the section of one tracker, which refuses secrets without repeating them."""

    @model_validator(mode="before")
    @classmethod
    def _has_no_secret(cls, values: Any) -> Any:
        known = set(cls.model_fields)
        for key in values if isinstance(values, dict) else ():
            if key not in known and _SECRET_KEY.search(str(key)):
                raise ValueError(f"the key {key!r} looks like a secret, which a config must not have; {cls._remedy()}")
        return values

    @classmethod
    def _remedy(cls) -> str:
        variables = VARIABLES.get(cls.__name__.removesuffix("Config").lower())
        return f"take it out and set {variables} in the environment" if variables else "take it out"


def _checked_address(address: str, key: str, section: str, schemes: tuple[str, ...]) -> str:
    """Returns the address. Raises ValueError, without repeating it, if it has a password or another scheme."""
    try:
        parts = urlsplit(address)
        has_secret = parts.username is not None or bool(parts.query)
    except ValueError:
        raise ValueError(f"tracking.{section}.{key} is no address; write one like {schemes[0]}://host:port") from None
    if has_secret:
        raise ValueError(
            f"tracking.{section}.{key} has a user, a password or a query in it, which would be written into the run's "
            f"folder and its checkpoints; take them out and set {VARIABLES[section]} in the environment"
        )
    if parts.scheme not in schemes:
        raise ValueError(
            f"tracking.{section}.{key} = {address!r} has none of the schemes {', '.join(schemes)}; write an address "
            f"like {schemes[0]}://host:port"
        )
    return address


class WandbConfig(_Tracker):
    """Weights & Biases; its key is read from WANDB_API_KEY."""

    project: str = Field(default="trivium", min_length=1)
    """The project that the run belongs to."""
    entity: str | None = None
    """The user or team that the project belongs to; left out, that of the key."""
    mode: Literal["online", "offline"] = "online"
    """Whether numbers are sent; offline keeps them in `run.dir`/wandb, and `wandb sync` sends them later."""


class MlflowConfig(_Tracker):
    """MLflow; name and password of its server are read from the environment."""

    uri: str | None = Field(default=None, min_length=1)
    """The address of a tracking server (http or https), or a folder; left out, it is `run.dir`/mlflow."""
    experiment: str = Field(default="trivium", min_length=1)
    """The experiment that the run belongs to."""

    @field_validator("uri")
    @classmethod
    def _uri_is_safe(cls, uri: str | None) -> str | None:
        return _checked_address(uri, "uri", "mlflow", ("http", "https")) if uri and "://" in uri else uri


class PrometheusConfig(_Tracker):
    """A text file with the newest numbers, for the textfile collector of Prometheus' node exporter."""

    file: str | None = None
    """The file, which must end in .prom; left out, it is `run.dir`/metrics.prom."""

    @field_validator("file")
    @classmethod
    def _is_collected(cls, file: str | None) -> str | None:
        if file is not None and not file.endswith(".prom"):
            raise ValueError(
                f"tracking.prometheus.file = {file!r} is not collected, since its name does not end in .prom; set "
                f"tracking.prometheus.file={file}.prom"
            )
        return file


class OtelConfig(_Tracker):
    """OpenTelemetry: numbers go to a collector by OTLP over HTTP; headers are read from OTEL_EXPORTER_OTLP_HEADERS."""

    endpoint: str = "http://localhost:4318/v1/metrics"
    """The collector's address for metrics."""
    every_seconds: float = Field(default=10.0, ge=0)
    """The least time between two exports, in seconds; the newest numbers are exported."""

    @field_validator("endpoint")
    @classmethod
    def _endpoint_is_safe(cls, endpoint: str) -> str:
        return _checked_address(endpoint, "endpoint", "otel", ("http", "https"))


class TrackingConfig(Section):
    """Services and files, besides metrics.jsonl, that get the numbers of a run. Training never waits for them."""

    wandb: WandbConfig | None = None
    """Weights & Biases; left out, nothing goes there."""
    mlflow: MlflowConfig | None = None
    """MLflow; left out, nothing goes there."""
    prometheus: PrometheusConfig | None = None
    """A text file for Prometheus; left out, there is none."""
    otel: OtelConfig | None = None
    """An OpenTelemetry collector; left out, nothing goes there."""

    @property
    def chosen(self) -> dict[str, Section]:
        """The trackers of the config, by name."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}
