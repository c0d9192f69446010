"""`trivium launch --on torchrun`: the command of torchrun for each node, printed, or started over ssh.

With `hosts` in the launch config the commands are started on them; else they are printed, to be started by hand.
torchrun ends with 1 whatever its ranks end with; its report, or the log of the run, has their statuses.
"""

import json
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from configs.launch import LaunchConfig
from configs.loader import ConfigError
from launch.elastic import elastic_start
from launch.launched_command import LaunchedCommand
from launch.processes import ProcessGroup
from launch.slurm_submit import python_of

ROOT = Path(__file__).resolve().parents[1]
ANSWER_SECONDS = 30  # the longest time in which a host has to answer over ssh
SAVE_SECONDS = "300"  # from SIGTERM to SIGKILL; torchrun's default is 30


class RemoteGroup(ProcessGroup):
    """Processes that ssh starts with launch.remote; signals other than SIGKILL are sent there as lines of text."""

    def start_on(self, ssh: Sequence[str], words: Sequence[str], job: Mapping[str, object]) -> None:
        """Starts `words`, which are quoted for the remote shell, and sends them the job that they read first."""
        process = self.start([*ssh, shlex.join(words)], stdin=subprocess.PIPE)
        self._write(process, json.dumps(job))

    def _pass_on(self, process: "subprocess.Popen[bytes]", number: int) -> None:
        self._write(process, str(int(number)))

    @staticmethod
    def _write(process: "subprocess.Popen[bytes]", line: str) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(f"{line}\n".encode())
            process.stdin.flush()
        except BrokenPipeError:  # ssh has ended, and its status says why
            pass


def start(command: LaunchedCommand, config: LaunchConfig, first_host: str | None, dry_run: bool) -> int:
    """Starts torchrun on all hosts and returns the status of the first that failed, or prints the commands."""
    if not command.trains:
        alone = shlex.join(["trivium", *command.name.split(), *command.arguments])
        raise ConfigError(f"`{command.name}` is one process and has no ranks; start it as `{alone}`")
    if config.nodes > 1 and not (config.hosts or first_host):
        raise ConfigError(
            f"nnodes = {config.nodes} needs --master-address, the host of node 0, to print the commands, or hosts, as "
            'in hosts=["gpu0", "gpu1"], to start them over ssh'
        )
    ranks_on = [config.nproc_per_node] * config.nodes
    if config.hosts and config.min_nodes and not dry_run:
        command, config, ranks_on = _with_hosts_that_answer(command, config)
    commands = [torchrun_words(command, config, node, first_host, ranks) for node, ranks in enumerate(ranks_on)]
    if dry_run or not config.hosts:
        for node, words in enumerate(commands):
            print(f"# node {node}{f', {config.hosts[node]}' if config.hosts else ''}\n{shlex.join(words)}")
        return 0
    environment = {name: os.environ[name] for name in config.environment if name in os.environ}
    remote = ["env", f"PYTHONPATH={ROOT}", *config.wrapper, python_of(config), "-m", "launch.remote"]
    with RemoteGroup() as group:
        for host, words in zip(config.hosts, commands, strict=True):
            job = {"command": words, "folder": str(Path.cwd()), "environment": environment}
            group.start_on([*config.ssh, host], remote, job)
        return group.wait()


def _with_hosts_that_answer(
    command: LaunchedCommand, config: LaunchConfig
) -> tuple[LaunchedCommand, LaunchConfig, list[int]]:
    """Returns the command in the nearest layout for the hosts that answer, the config with them, and their ranks.

    Raises ConfigError if fewer than min_nodes answer.
    """
    assert config.min_nodes is not None
    with ThreadPoolExecutor(len(config.hosts)) as pool:
        answers = list(pool.map(lambda host: _answers(config.ssh, host), config.hosts))
    there = [host for host, answer in zip(config.hosts, answers, strict=True) if answer]
    silent = ", ".join(host for host in config.hosts if host not in there)
    if len(there) < config.min_nodes:
        raise ConfigError(
            f"{silent} did not answer over ssh in {ANSWER_SECONDS} s, and the {len(there)} other machines are fewer "
            f"than min_nodes = {config.min_nodes}; mend them, or set min_nodes"
        )
    per_node = config.nproc_per_node
    start = elastic_start(command.module, command.arguments, len(there), per_node, len(config.hosts))
    if start.said:
        print(f"elastic: {start.said}{f'; {silent} did not answer' if silent else ''}", flush=True)
    used = start.nodes(per_node)
    config = config.model_copy(update={"hosts": tuple(there[:used]), "nnodes": used})
    return replace(command, arguments=start.arguments), config, [start.ranks_on(node, per_node) for node in range(used)]


def _answers(ssh: Sequence[str], host: str) -> bool:
    try:
        done = subprocess.run(
            [*ssh, host, "true"], capture_output=True, stdin=subprocess.DEVNULL, timeout=ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def torchrun_words(
    command: LaunchedCommand, config: LaunchConfig, node: int, first_host: str | None, ranks: int | None = None
) -> list[str]:
    """Returns the command for one node, as a list of words. Ranks meet at the first host, where torchrun listens.

    A node has `ranks` ranks if that is given, else as many as the config says.
    """
    words = [*config.wrapper, python_of(config), "-m", "torch.distributed.run"]
    words += ["--nnodes", str(config.nodes), "--nproc-per-node", str(ranks or config.nproc_per_node)]
    if config.nodes == 1:
        words += ["--standalone"]
    else:
        first = config.hosts[0].rpartition("@")[2] if config.hosts else first_host
        # By itself torchrun compares host names to find out where it listens, which fails for addresses.
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:{config.port}"]
        words += ["--rdzv-id", f"trivium-{config.port}", "--rdzv-conf", f"is_host={int(node == 0)}"]
        words += ["--local-addr", config.hosts[node].rpartition("@")[2]] if config.hosts else []
        words += ["--local-addr", str(first)] if node == 0 and not config.hosts else []
    words += ["--max-restarts", str(config.max_restarts), "--shutdown-timeout", SAVE_SECONDS]
    return [*words, "-m", command.module, *command.arguments]
