"""Runs tasks in Ray actors, on a running cluster or on a Ray that is started on this machine for the run.

datatrove's RayPipelineExecutor distributes the tasks. It logs a failed one and continues; here its error, which the
task wrote to a file, is raised. Ray is an optional dependency, loaded only if a run uses it. All nodes need the run
directory. A task that Ray starts again after it lost a worker ends the stage with an error.
"""

import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from datatrove.executor.ray import RayPipelineExecutor

from configs.data_run import RayConfig
from configs.loader import ConfigError
from data_pipeline.core.progress import SetNote
from data_pipeline.executors.base import Executor, PipelineJob
from data_pipeline.executors.stage_tasks import Tasks

ANSWER_SECONDS = 10.0  # in which a cluster's port must answer


def too_small(nodes: Sequence[Mapping[str, float]], options: RayConfig) -> str:
    """Returns why none of the nodes has room for a task and what to set instead; "" if one of them has.

    Each node is a map of Ray's names of resources to their amounts: cores for CPU, bytes for memory.
    """
    cores, gb = options.cpus_per_task, options.mem_per_cpu_gb
    most_cores = int(max((node.get("CPU", 0) for node in nodes), default=0))
    if cores > most_cores:
        remedy = f"set run.ray.cpus_per_task={most_cores}" if most_cores else "start nodes with cores"
        return f"run.ray.cpus_per_task = {cores}, and no node of Ray has more than {most_cores} cores; {remedy}"
    memory = max(node.get("memory", 0) for node in nodes if node.get("CPU", 0) >= cores) / 2**30
    if gb * cores <= memory:
        return ""
    fits = math.floor(1000 * memory / cores) / 1000
    remedy = f"set run.ray.mem_per_cpu_gb={fits}" if fits else "start nodes with memory"
    return (
        f"run.ray.mem_per_cpu_gb = {gb:g} is {gb * cores:,.1f} GiB for the {cores} cores of a task, and no node of the "
        f"Ray cluster with so many cores has more than {memory:,.1f}; {remedy}"
    )


def check_answers(address: str) -> None:
    """Raises OSError unless something answers at an address of the form host:port; Ray itself tries for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()


class RayTasks(Tasks, RayPipelineExecutor):
    """A pipeline and its tasks, in the form that datatrove submits to Ray."""


class RayExecutor(Executor):
    """Runs tasks in actors of a Ray cluster. Raises ConfigError if Ray is not installed or no node is large enough."""

    def __init__(self, options: RayConfig, workers: int) -> None:
        # Ray reads this when it is imported; without it, it sends usage statistics to its developers.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "run.executor = ray needs the package ray; run: pip install -c constraints.txt '.[ray]', or use "
                "--executor local"
            ) from None
        self._ray: Any = ray
        self._options = options
        self.workers = workers

    def __enter__(self) -> "RayExecutor":
        common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
        if address := self._options.address:
            try:
                check_answers(address)
                self._ray.init(address=address, **common)
            except (OSError, RuntimeError, ValueError) as error:  # Ray's, for a cluster that is not there
                why = re.split(r"\.\s", str(error))[0]
                raise ConfigError(
                    f"run.ray.address = {address!r}: no Ray cluster answers ({why}); start one with `ray "
                    "start --head`, correct the address, or leave run.ray.address out to use Ray on this machine alone"
                ) from None
        else:
            cpus = self.workers * self._options.cpus_per_task
            self._ray.init(
                address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **common
            )
        self._require_room()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()

    def _require_room(self) -> None:
        """Raises ConfigError if no node is large enough for a task; Ray would wait for the cluster to grow."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if reason := too_small(nodes, self._options):
            self._ray.shutdown()
            raise ConfigError(reason)

    def run(self, job: PipelineJob, set_note: SetNote) -> None:
        RayTasks(
            list(job.steps),
            tasks=job.tasks,
            workers=self.workers,
            logging_dir=str(job.logs.absolute()),
            skip_completed=False,
            cpus_per_task=self._options.cpus_per_task,
            mem_per_cpu_gb=self._options.mem_per_cpu_gb,
        ).run()
