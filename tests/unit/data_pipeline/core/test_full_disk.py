"""Tests that an unwritable run.dir and a full disk give a one-sentence error under every executor."""

import json
import subprocess
from pathlib import Path

import pytest

from configs.loader import ConfigError
from data_pipeline.command import main
from data_pipeline.report import ledger_tables as report
from tests.data_runs import ROOT, command, environment, write_inputs

IN_OWN_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
HEAVY = pytest.mark.full


@pytest.mark.skipif(
    subprocess.run([*IN_OWN_NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="this system does not let users mount file systems",
)
@pytest.mark.parametrize(
    ("workers", "ranks"), [(2, 0), pytest.param(1, 0, marks=HEAVY), pytest.param(1, 2, marks=HEAVY)]
)
def test_a_full_disk_is_named(workers: int, ranks: int, tmp_path: Path) -> None:
    config = write_inputs(tmp_path)
    (tmp_path / "run").mkdir()
    mount = (
        f"mount -t tmpfs -o size=128k none {tmp_path}/run || exit 99; "
        f'"$@"; failed=$?; mount -o remount,size=64m {tmp_path}/run && "$@" && exit $failed; exit 98'
    )
    asked = command(config, f"run.workers={workers}", "--until", "extract", ranks=ranks)
    done = subprocess.run(
        [*IN_OWN_NAMESPACE, "sh", "-c", mount, "sh", *asked],
        cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, f"no room was made, or it did not help: {done.stdout}{done.stderr}"
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and f"the disk of {tmp_path}/run" in told[0] and "No space left on device" in told[0]
    assert "make room there" in told[0] and "Traceback" not in done.stderr


def test_a_run_dir_that_cannot_be_is_a_mistake_in_the_config(tmp_path: Path) -> None:
    config = write_inputs(tmp_path)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(ConfigError, match=f"run.dir = '{folder}': {tmp_path}/file is a file; name a folder"):
            main([str(config), f"run.dir={folder}"])
    with pytest.raises(ConfigError, match=r"run\.dir = '/proc/run': nothing can be written there"):
        main([str(config), "run.dir=/proc/run"])


def test_damaged_json_is_named_or_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_inputs(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/inputs.json").write_text('{"a": ')  # a cache
    assert main([str(config), "run.workers=1", "--until", "extract"]) == 0
    ledger = tmp_path / "run/ledger.json"
    ledger.write_text(ledger.read_text()[:-9])
    capsys.readouterr()
    assert report.main([str(config)]) == 1
    assert f"error: {ledger} is damaged" in capsys.readouterr().err
    assert main([str(config), "run.workers=1", "--until", "extract"]) == 0
    assert json.loads(ledger.read_text())["stages"]
