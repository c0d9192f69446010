"""`trivium launch --on torchrun`: the command of torchrun for each node, printed, or started over ssh.

With `hosts` in the launch config the commands are started on them; else they are printed, to be started by hand.
torchrun ends with 1 whatever its ranks end with; its report, or the log of the run, has their statuses.
"""

import json
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.launch import LaunchConfig
from configs.loader import ConfigError
from launch.launched_command import LaunchedCommand
from launch.processes import ProcessGroup
from launch.slurm_submit import python_of

ROOT = Path(__file__).resolve().parents[1]
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
        raise ConfigError(f"`{command.name}` is one process and has no ranks; start it as `trivium {command.name}`")
    if config.nodes > 1 and not (config.hosts or first_host):
        raise ConfigError(
            f"nnodes = {config.nodes} needs --master-address, the host of node 0, to print the commands, or hosts, as "
            'in hosts=["gpu0", "gpu1"], to start them over ssh'
        )
    commands = [torchrun_words(command, config, node, first_host) for node in range(config.nodes)]
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


def torchrun_words(command: LaunchedCommand, config: LaunchConfig, node: int, first_host: str | None) -> list[str]:
    """Returns the command for one node, as a list of words. Ranks meet at the first host, where torchrun listens."""
    words = [*config.wrapper, python_of(config), "-m", "torch.distributed.run"]
    words += ["--nnodes", str(config.nodes), "--nproc-per-node", str(config.nproc_per_node)]
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
