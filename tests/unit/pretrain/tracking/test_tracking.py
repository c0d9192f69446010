"""Trackers of a run, with their real libraries: what they get, how a run goes on, and that nothing waits for them."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from configs.loader import ConfigError, validate
from configs.tracking import TrackingConfig
from pretrain.logs.metrics_file import numbers
from pretrain.tracking import child, trackers
from pretrain.tracking.trackers import Trackers, check_installed

ROOT = Path(__file__).resolve().parents[4]
needs = {
    name: pytest.mark.skipif(find_spec(module.split(".")[0]) is None, reason=f"{package} is not installed")
    for name, (module, package) in trackers.LIBRARIES.items()
}
SECRET = "plantedSecret-4242"
CONFIG = {"run": {"dir": "runs/x"}, "optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}}


def write(trackers: Trackers, step: int) -> None:
    by_layer = {"layer 1 (moe)": 0.5}
    record = {"step": step, "loss": 1 / step, "mfu": None, "loss_by_source": {"prose": 2.0}, "by_layer": by_layer}
    trackers.write(step, numbers(record))


def opened(run_dir: Path, **config: Any) -> Trackers:
    run_dir.mkdir(exist_ok=True)
    return Trackers(validate(TrackingConfig, config), run_dir, CONFIG)


@contextmanager
def collector(answers: bool = True, status: int = 200) -> Iterator[tuple[str, list[bytes]]]:
    """Serves a collector on loopback; gives its address and the bodies it gets. Without `answers` it never replies."""
    bodies: list[bytes] = []
    leave = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            if not answers:
                leave.wait(60)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/metrics", bodies
    finally:
        leave.set()
        server.shutdown()
        server.server_close()


def exported(bodies: list[bytes]) -> dict[str, list[float]]:
    """Returns the values of each metric in the bodies of requests, as `name` or `name/part`."""
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    found: dict[str, list[float]] = {}
    for body in bodies:
        request = ExportMetricsServiceRequest.FromString(body)
        for metric in request.resource_metrics[0].scope_metrics[0].metrics:
            for point in metric.gauge.data_points:
                part = "".join(f"/{attribute.value.string_value}" for attribute in point.attributes)
                found.setdefault(metric.name + part, []).append(point.as_double)
    return found


def assert_wandb(run_dir: Path, run_id: str) -> None:
    offline = list((run_dir / "wandb").glob("offline-run-*"))
    assert {folder.name.split("-")[-1] for folder in offline} == {run_id}
    content = b"".join(file.read_bytes() for file in (run_dir / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert {step for step in (1, 2, 3) if b"step\x82\x01\x01%d" % step in content} == {1, 2, 3}
    assert b"loss_by_source/prose" in content and b"0.3333333333333333" in content


def assert_mlflow(store: Path, run_id: str) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store.as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert run.data.params["optimizer.betas"] == "[0.9, 0.95]"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(s, 1 / s) for s in (1, 2, 2, 3)]
    assert run.data.metrics["by_layer/layer 1 _moe_"] == 0.5


@needs["prometheus"]
@needs["otel"]
@pytest.mark.parametrize(
    "names",
    [
        ("prometheus", "otel"),
        pytest.param(
            ("wandb", "mlflow", "prometheus", "otel"), marks=[needs["wandb"], needs["mlflow"], pytest.mark.full]
        ),
    ],
)
def test_all_get_the_numbers_and_a_run_that_goes_on_continues_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], names: tuple[str, ...]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET * 3)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    run_dir, store = tmp_path / "a run é", tmp_path / "ml flow é"
    with collector() as (endpoint, bodies):
        config: dict[str, Any] = {
            "wandb": {"project": "p", "mode": "offline"},
            "mlflow": {"uri": str(store), "experiment": "e"},
            "prometheus": {},
            "otel": {"endpoint": endpoint, "every_seconds": 0},
        }
        config = {name: section for name, section in config.items() if name in names}
        for steps, finished in (((1, 2), False), ((2, 3), True)):
            opened_now = opened(run_dir, **config)
            for step in steps:
                write(opened_now, step)
            opened_now.close(finished)
    assert "warning" not in capfd.readouterr().out

    ids = {name: kept["run"] for name, kept in json.loads((run_dir / "tracking.json").read_text()).items()}
    assert set(ids) == set(config)
    if "wandb" in names:
        assert_wandb(run_dir, ids["wandb"])
    if "mlflow" in names:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        assert_mlflow(store, ids["mlflow"])
    from prometheus_client.parser import text_string_to_metric_families

    text = (run_dir / "metrics.prom").read_text(encoding="utf-8")
    samples = {(s.name, s.labels["part"]): s.value for f in text_string_to_metric_families(text) for s in f.samples}
    assert samples["trivium_step", ""] == 3 and samples["trivium_loss_by_source", "prose"] == 2
    assert 'run="a run é"' in text

    values = exported(bodies)
    assert set(values["trivium.step"]) == {1, 2, 3} and values["trivium.loss_by_source/prose"][-1] == 2

    for file in run_dir.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


@needs["otel"]
def test_one_that_hangs_costs_training_nothing_and_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "WAITING", 5)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 1.0)
    with collector(answers=False) as (endpoint, bodies):
        hanging = opened(tmp_path / "run", otel={"endpoint": endpoint, "every_seconds": 0})
        write(hanging, 1)
        deadline = time.monotonic() + 30
        while not bodies and time.monotonic() < deadline:
            time.sleep(0.02)
        (process,) = [tracker._process for tracker in hanging._trackers]
        assert bodies and process is not None
        os.kill(process.pid, signal.SIGSTOP)  # it no longer reads either
        began, slowest = time.monotonic(), 0.0
        for step in range(2, 5002):  # more than the pipe and the queue hold
            before = time.perf_counter()
            write(hanging, step)
            slowest = max(slowest, time.perf_counter() - before)
            assert time.monotonic() - began < 60 and slowest < 10, slowest
        began = time.monotonic()
        hanging.close(finished=True)
        assert time.monotonic() - began < 15 and process.poll() == -signal.SIGKILL
    told = capfd.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in told] == ["tracking.otel"] * 2, told
    assert "5 steps wait already" in told[0] and "5,001 of 5,001 records did not get there" in told[1]


@needs["otel"]
def test_what_was_sent_arrives_though_the_run_is_killed(tmp_path: Path) -> None:
    script = """
import os, signal, sys, time
from pathlib import Path
from configs.tracking import OtelConfig, TrackingConfig
from pretrain.tracking.trackers import Trackers
trackers = Trackers(TrackingConfig(otel=OtelConfig(endpoint=sys.argv[1], every_seconds=60)), Path(sys.argv[2]), {})
for step in (1, 2):
    trackers.write(step, {"loss": 1.0})
(tracker,) = trackers._trackers
while tracker._offered > tracker._taken:  # all is sent
    time.sleep(0.01)
print(tracker._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with collector() as (endpoint, bodies):
        command = [sys.executable, "-c", script, endpoint, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        deadline = time.monotonic() + 30
        while Path(f"/proc/{done.stdout.strip()}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert time.monotonic() < deadline, "the tracker's process lives on"
    assert exported(bodies)["trivium.step"] == [1.0, 2.0]  # at once, and at the end


@needs["otel"]
def test_a_collector_that_refuses_metrics_is_told() -> None:
    for status in (400, 200):
        with collector(status=status) as (endpoint, bodies):
            one = child.Otel({"name": "x", "endpoint": endpoint, "every_seconds": 0})
            if status == 200:
                one.write(1, {"loss": 1.0})
            else:
                with pytest.raises(ConnectionError, match="the collector did not take the metrics"):
                    one.write(1, {"loss": 1.0})
            assert len(bodies) == 1


@needs["otel"]
def test_one_that_does_not_answer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "FAILED_CLOSE_SECONDS", 0.1)
    for answers in (True, False):
        with collector(answers) as (endpoint, bodies):
            one = opened(tmp_path / str(answers), otel={"endpoint": endpoint, "every_seconds": 0})
            write(one, 1)
            (tracker,) = one._trackers
            deadline = time.monotonic() + 30
            while not (tracker._taken if answers else bodies) and time.monotonic() < deadline:
                time.sleep(0.02)
            tracker._heard -= 2 * trackers.SILENT_SECONDS  # a long step
            write(one, 2)
            write(one, 3)
            one.close(finished=True)
    told = capfd.readouterr().out.splitlines()
    assert len(told) == 2 and "tracking.otel: it has not answered for 60 seconds; training goes on" in told[0]
    assert "3 of 3 records did not get there (it has not answered" in told[1]


@needs["prometheus"]
def test_one_that_fails_is_told_once_and_soon_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "FAILED_CLOSE_SECONDS", 0.2)
    (tmp_path / "no folder").touch()
    failing = opened(tmp_path / "run", prometheus={"file": str(tmp_path / "no folder" / "a.prom")})
    for step in range(1, 4):
        write(failing, step)
    failing.close(finished=True)
    first, last = capfd.readouterr().out.splitlines()
    assert first.startswith("warning: tracking.prometheus: FileExistsError") and "training goes on" in first
    assert "3 of 3 records did not get there (FileExistsError" in last
    new = tmp_path / "no folder yet/a.prom"
    child.Prometheus({"name": "run", "file": str(new)}).write(1, {"loss": 2.0})
    assert 'trivium_loss{part="",run="run"} 2.0' in new.read_text(encoding="utf-8")


def test_errors_are_told_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"api-key={SECRET}")
    error = ValueError(f"401 for {SECRET} at https://me:pass@host/path")
    assert child._told(error) == "ValueError: 401 for *** at https://***@host/path"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"wandb": {"project": "p", "api_key": SECRET}}, "'api_key' looks like a secret.*set WANDB_API_KEY"),
        ({"mlflow": {"uri": f"https://me:{SECRET}@host", "experiment": "e"}}, "set MLFLOW_TRACKING_TOKEN"),
        ({"otel": {"endpoint": f"https://host/v1/metrics?key={SECRET}"}}, "set OTEL_EXPORTER_OTLP_HEADERS"),
        ({"otel": {"headers": {"api-key": SECRET}}}, "'headers' looks like a secret"),
        ({"otel": {"endpoint": "localhost:4318"}}, "none of the schemes http, https"),
        ({"prometheus": {"file": "a.txt"}}, "set tracking.prometheus.file=a.txt.prom"),
    ],
)
def test_secrets_and_wrong_addresses_in_a_config_are_refused_and_not_repeated(
    section: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(TrackingConfig, section)
    assert re.search(words, str(caught.value)) and SECRET not in str(caught.value)


def test_a_missing_library_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.LIBRARIES, "wandb", ("no_such_library.part", "no-such-library"))
    config = validate(TrackingConfig, {"wandb": {"project": "p"}})
    with pytest.raises(ConfigError, match=r"\[tracking.wandb\] needs the package no-such-library.*trivium\[tracking\]"):
        check_installed(config)
    check_installed(validate(TrackingConfig, {}))


def test_a_file_or_folder_that_cannot_be_written_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuses each before the first step, on the main rank alone; folders that are not there are made later."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers, "LIBRARIES", dict.fromkeys(trackers.LIBRARIES, ("json", "json")))
    Path("file").touch()
    Path("folder.prom").mkdir()

    def check(**sections: dict[str, Any]) -> None:
        check_installed(validate(TrackingConfig, sections))

    with pytest.raises(ConfigError, match=r"tracking.prometheus.file = 'file/a.prom': file is a file; name a folder"):
        check(prometheus={"file": "file/a.prom"})
    with pytest.raises(ConfigError, match=r"tracking.mlflow.uri = 'file': file is a file; name a folder"):
        check(mlflow={"uri": "file", "experiment": "e"})
    with pytest.raises(ConfigError, match=r"folder.prom' is a folder; name a file in it, such as (\S+)$") as refused:
        check(prometheus={"file": "folder.prom"})
    check(prometheus={"file": str(refused.value).split()[-1]}, mlflow={"uri": "new/store", "experiment": "e"})
    assert not Path("new").exists()
    monkeypatch.setattr(trackers, "is_main", lambda: False)
    check(prometheus={"file": "file/a.prom"})
