"""Training that starts with fewer nodes than its config was written for: what each node starts, says and refuses."""

import re
import subprocess
from pathlib import Path

import pytest

from configs.launch import LaunchConfig
from configs.loader import ConfigError
from launch import elastic, on_torchrun, ranks
from launch.environment import ClusterEnvironment
from launch.launched_command import read_command

ROOT = Path(__file__).resolve().parents[3]
DEMO = str(ROOT / "configs/pretrain/demo.toml")
BATCH = ["train.global_batch_size=512", "train.micro_batch_size=4"]
TRAIN = ["train", DEMO, *BATCH, "parallel.tp=2", "parallel.pp=2"]


def started(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[list[str], list[ClusterEnvironment]]:
    """Returns the command and the ranks that a launcher of four ranks a node starts here; nothing for no rank."""
    given: list[tuple[list[str], list[ClusterEnvironment]]] = []

    def run_ranks(command: list[str], envs: list[ClusterEnvironment]) -> int:
        given.append((command, envs))
        return 0

    monkeypatch.setattr(ranks, "run_ranks", run_ranks)
    assert ranks.main(["--nproc-per-node", "4", "--master-address", "node0", *arguments]) == 0
    return given[0] if given else ([], [])


@pytest.mark.parametrize(("batch", "parts"), [(10, [4, 4, 2]), (8, [4, 4, 0])])
def test_each_node_finds_the_same_layout_and_starts_its_part_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], batch: int, parts: list[int]
) -> None:
    sizes = [f"train.global_batch_size={batch}", "train.micro_batch_size=2", "parallel.tp=2"]
    words, said = [], []
    for node, count in enumerate(parts):
        three = ("--nnodes", "3", "--min-nodes", "1", "--node-rank", str(node))
        command, envs = started(monkeypatch, *three, "train", DEMO, *sizes)
        said.append(capsys.readouterr().out)
        assert [env.rank for env in envs] == [4 * node + rank for rank in range(count)]
        assert all((env.world_size, env.local_world_size) == (sum(parts), count) for env in envs)
        words += [command] if count else []
    assert all(command == words[0] for command in words)
    assert said[0].startswith(f"elastic: 3 nodes with 12 ranks: the layout is tp2 pp1 dp{batch // 2} zero1; ")
    assert f"dp 6 is not possible with train.global_batch_size = {batch}" in said[0] and not said[1]
    assert ("this node has no rank" in said[2]) == (not parts[2])


def test_jobs_of_slurm_take_fewer_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--on", "slurm", "--dry-run", "--nproc-per-node", "8", "--nnodes", "4"]
    assert ranks.main([*options, "--min-nodes", "2", *TRAIN]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=2-4\n" in script and "\nmin_nodes=2\n" in script
    assert re.search(r"^command=.* launch\.ranks --nproc-per-node 8 --min-nodes 1 pretrain\.train", script, re.M)
    assert re.search(r"^wanted=\(4 8 pretrain\.train ", script, re.M)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert ranks.main([*options, *TRAIN]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=4\n" in script and "\nelastic=()\n" in script


def test_a_job_is_told_how_many_of_its_nodes_have_work(capsys: pytest.CaptureFixture[str]) -> None:
    for nodes, used, said in (
        (4, 4, ""),
        (
            3,
            2,
            "3 of 4 nodes with 24 ranks: tp2 pp2 dp8 zero1 becomes tp2 pp2 dp4 zero1; 8 of 24 ranks stay idle, since ",
        ),
        (2, 2, "2 of 4 nodes with 16 ranks: tp2 pp2 dp8 zero1 becomes tp2 pp2 dp4 zero1; the global batch and its "),
    ):
        assert elastic.main([str(nodes), "4", "8", "pretrain.train", *TRAIN[1:]]) == 0
        out, err = capsys.readouterr()
        assert int(out) == used and err.startswith(said) and bool(err) == bool(said)
    assert elastic.main(["1", "4", "1", *TRAIN]) == 0
    err = capsys.readouterr().err
    assert "parallel.tp=1 parallel.pp=1" in err and "a rank may hold up to 4 times as much of the model" in err


def test_only_hosts_that_answer_are_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = tmp_path / "ssh"
    script.write_text('#!/bin/sh\ncase "$1" in gpu1|gpu3) exit 255;; esac\n')
    script.chmod(0o755)
    given: list[tuple[list[str], list[str]]] = []
    monkeypatch.setattr(
        on_torchrun.RemoteGroup, "start_on", lambda _, ssh, __, job: given.append((list(ssh), job["command"]))
    )
    hosts = 'hosts=["gpu0", "gpu1", "gpu2", "gpu3"]'
    options = ["--on", "torchrun", "--nproc-per-node", "2", "--set", hosts, "--set", f'ssh=["{script}"]']
    assert ranks.main([*options, "--min-nodes", "2", *TRAIN]) == 0
    said = capsys.readouterr().out
    assert "2 of 4 nodes with 4 ranks: tp2 pp2 dp2 zero1 becomes tp2 pp2 dp1 zero1" in said
    assert "gpu1, gpu3 did not answer" in said
    assert [ssh[-1] for ssh, _ in given] == ["gpu0", "gpu2"]
    assert all(words[words.index("--nnodes") + 1] == "2" for _, words in given)
    with pytest.raises(ConfigError, match=r"gpu1, gpu3 did not answer .* fewer than min_nodes = 3"):
        ranks.main([*options, "--min-nodes", "3", *TRAIN])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nnodes", "2", "--min-nodes", "3", *TRAIN], "min_nodes = 3 is more than the 2 machines"),
        (["--on", "mpi", "--nnodes", "4", "--min-nodes", "1", *TRAIN], "for mpirun set hosts"),
        (["--on", "torchrun", "--nnodes", "4", "--min-nodes", "1", *TRAIN], "min_nodes needs hosts"),
        (["--on", "slurm", "--nnodes", "2", "--min-nodes", "1", "sft", "x.toml"], "only the configs of `train`"),
        (["--min-nodes", "0", *TRAIN], "--min-nodes 0 starts no rank"),
    ],
)
def test_what_cannot_be_elastic_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.toml").write_bytes((ROOT / "configs/posttrain/demo_sft.toml").read_bytes())
    with pytest.raises(ConfigError) as raised:
        ranks.main(arguments)
    assert words in str(raised.value)


def test_min_nodes_of_a_config_alone_say_nothing_about_nodes() -> None:
    assert LaunchConfig(min_nodes=3).min_nodes == 3  # inside a job, whose nodes Slurm counts
    assert read_command(TRAIN, 32).trains
