"""A tracker's process, which `trackers.py` starts: reads records from its stdin and gives them to one library.

It imports nothing of Trivium. stdin has one JSON object a line: first the settings, then {"step": number, "values":
numbers by name} for each record, and at the end {"end": whether the run is finished}. The replies on stdout are JSON
objects, one a line: {"run": id} once the tracker has begun, {"done": 1} for each record that it took, {"error": text}
for what failed, and {"end": true}.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

TRIES = 5  # of a record, if the one before it was taken; else there is one try
LONGEST_WAIT = 60.0  # seconds between two tries to begin
MLFLOW_BATCH = 500  # metrics in one request; a server takes 1,000 at most
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|HEADER|CREDENTIAL", re.IGNORECASE)


class Wandb:
    """Run of Weights & Biases. Its x-axis is the key `step`, so that a resumed run may log steps again."""

    def __init__(self, settings: dict[str, Any]) -> None:
        wandb = import_module("wandb")
        self.run = settings["run"] or os.urandom(8).hex()
        self._run = wandb.init(
            project=settings["project"],
            entity=settings.get("entity"),
            mode=settings["mode"],
            id=self.run,
            resume="allow",
            name=settings["name"],
            config=settings["config"],
            dir=settings["run_dir"],
            settings=wandb.Settings(
                console="off", disable_git=True, save_code=False, silent=True, x_disable_meta=True, x_disable_stats=True
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class Mlflow:
    """Run of MLflow, on a server or in a folder."""

    def __init__(self, settings: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # or it takes minutes to say that it failed
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        uri = settings["uri"] or str(Path(settings["run_dir"], "mlflow"))
        if "://" not in uri:
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # a folder is what the config asks for
            uri = Path(uri).absolute().as_uri()
        self._metric = import_module("mlflow.entities").Metric
        self._client = import_module("mlflow.tracking").MlflowClient(uri)
        self.run = settings["run"]
        if self.run:
            self._client.update_run(self.run, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(settings["experiment"])
        experiment = found.experiment_id if found else self._client.create_experiment(settings["experiment"])
        self.run = self._client.create_run(experiment, run_name=settings["name"]).info.run_id
        for key, value in settings["config"].items():
            self._client.log_param(self.run, _plain_name(key), str(value)[:500])

    def write(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_plain_name(name), value, now, step) for name, value in values.items()]
        for first in range(0, len(metrics), MLFLOW_BATCH):
            self._client.log_batch(self.run, metrics=metrics[first : first + MLFLOW_BATCH])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.run, "FINISHED" if finished else "KILLED")


class Prometheus:
    """Text file with the newest numbers, replaced as a whole."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._library = import_module("prometheus_client")
        self._registry = self._library.CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._name, self._file = settings["name"], settings["file"] or str(Path(settings["run_dir"], "metrics.prom"))
        Path(self._file).absolute().parent.mkdir(parents=True, exist_ok=True)
        self.run = self._file

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in {"step": float(step), **values}.items():
            metric, part = _metric_and_part(name)
            if metric not in self._gauges:
                text = f"{metric} of a training run of Trivium"
                self._gauges[metric] = self._library.Gauge(
                    f"trivium_{metric}", text, ["run", "part"], registry=self._registry
                )
            self._gauges[metric].labels(self._name, part).set(value)
        self._library.write_to_textfile(self._file, self._registry)

    def close(self, finished: bool) -> None:
        pass


class Otel:
    """Gauges that are exported to a collector by OTLP over HTTP."""

    def __init__(self, settings: dict[str, Any]) -> None:
        metrics = import_module("opentelemetry.sdk.metrics")
        export = import_module("opentelemetry.sdk.metrics.export")
        resource = import_module("opentelemetry.sdk.resources").Resource
        exporter = import_module("opentelemetry.exporter.otlp.proto.http.metric_exporter").OTLPMetricExporter
        self.run = settings["name"]
        self._every, self._exported = settings["every_seconds"], 0.0
        self._inner, self._ok = exporter(endpoint=settings["endpoint"], timeout=10), export.MetricExportResult.SUCCESS
        self._reader = export.InMemoryMetricReader()
        attributes = {"service.name": "trivium", "trivium.run": settings["name"]}
        provider = metrics.MeterProvider([self._reader], resource.create(attributes), shutdown_on_exit=False)
        self._meter = provider.get_meter("trivium")
        self._gauges: dict[str, Any] = {}

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in {"step": float(step), **values}.items():
            metric, part = _metric_and_part(name)
            if metric not in self._gauges:
                self._gauges[metric] = self._meter.create_gauge(f"trivium.{metric}")
            self._gauges[metric].set(value, {"part": part} if part else {})
        if time.monotonic() - self._exported >= self._every:
            self._export()

    def close(self, finished: bool) -> None:
        self._export()

    def _export(self) -> None:
        self._exported = time.monotonic()
        data = self._reader.get_metrics_data()
        if data is not None and self._inner.export(data) is not self._ok:
            raise ConnectionError("the collector did not take the metrics")


CLIENTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "prometheus": Prometheus,
    "otel": Otel,
}


def _metric_and_part(name: str) -> tuple[str, str]:
    """Divides `loss_by_source/english` into a metric's name, of letters that every system takes, and a label."""
    metric, _, part = name.partition("/")
    return re.sub(r"\W", "_", metric, flags=re.ASCII), part


def _plain_name(name: str) -> str:
    """Replaces the characters that MLflow does not take in a name."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def _told(error: BaseException) -> str:
    """Describes an error in one line, without addresses' passwords and without values of secret variables."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for name, value in os.environ.items():
        if len(value) >= 4 and _SECRET_NAME.search(name):
            for part in (value, *re.split(r"[=,\s]+", value)):
                text = text.replace(part, "***") if len(part) >= 4 else text
    return re.sub(r"://[^/@\s]+@", "://***@", text)[:300]


def _waits() -> Iterator[float]:
    seconds = 1.0
    while True:
        yield seconds
        seconds = min(2 * seconds, LONGEST_WAIT)


def main() -> None:
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):  # a library that prints or asks reaches nobody
        os.dup2(nowhere, number)

    client: Any = None

    def say(**message: Any) -> None:
        try:
            replies.write(json.dumps(message) + "\n")
            replies.flush()
        except BrokenPipeError:  # the run has been killed; a tracker that has begun still gets what it was sent
            if client is None:
                raise

    settings = json.loads(requests.readline())
    for seconds in _waits():
        try:
            client = CLIENTS[settings["tracker"]](settings)
            break
        except Exception as error:
            say(error=_told(error))
            time.sleep(seconds)
    say(run=client.run)
    works, finished = True, False
    for line in requests:
        record = json.loads(line)
        if "end" in record:
            finished = record["end"]
            break
        works = _write(client, record, TRIES if works else 1, say)
    try:
        client.close(finished)
    except Exception as error:
        say(error=_told(error))
    say(end=True)


def _write(client: Any, record: dict[str, Any], tries: int, say: Callable[..., None]) -> bool:
    """Gives a record to the tracker, with waits between `tries` tries; returns whether the tracker took it."""
    for seconds, last in zip(_waits(), [False] * (tries - 1) + [True], strict=False):
        try:
            client.write(record["step"], record["values"])
            say(done=1)
            return True
        except Exception as error:
            say(error=_told(error))
            if not last:
                time.sleep(seconds)
    return False


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):  # the run has been killed
        sys.exit(1)
