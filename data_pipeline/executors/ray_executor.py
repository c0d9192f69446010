"""Runs tasks in Ray actors, on a running cluster or on a Ray that is started on this machine for the run.

datatrove's RayPipelineExecutor distributes the tasks. It logs a failed one and continues; here its error, which the
task wrote to a file, is raised. Ray is an optional dependency, loaded only if a run uses it. All nodes need the run
directory. A task that Ray starts again after it lost a worker ends the stage with an error.
"""

import os
from types import TracebackType
from typing import Any

from datatrove.executor.ray import RayPipelineExecutor

from configs.data_run import RayConfig
from configs.loader import ConfigError
from data_pipeline.core.progress import Say
from data_pipeline.executors.base import Executor, PipelineJob
from data_pipeline.executors.tasks import Tasks


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
        if self._options.address:
            self._ray.init(address=self._options.address, **common)
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
        needs = {"CPU": self._options.cpus_per_task, "memory": self._memory()}
        for name, amount in needs.items():
            most = max((node["Resources"].get(name, 0) for node in self._ray.nodes() if node["Alive"]), default=0)
            if amount > most:
                self._ray.shutdown()
                raise ConfigError(
                    f"run.ray needs {amount:,.0f} of {name} per task, and no node of the Ray cluster has more than "
                    f"{most:,.0f}; lower run.ray.cpus_per_task or run.ray.mem_per_cpu_gb"
                )

    def _memory(self) -> float:
        """Memory that a task needs, in bytes."""
        return self._options.mem_per_cpu_gb * self._options.cpus_per_task * 2**30

    def run(self, job: PipelineJob, say: Say) -> None:
        RayTasks(
            list(job.steps),
            tasks=job.tasks,
            workers=self.workers,
            logging_dir=str(job.logs.absolute()),
            skip_completed=False,
            cpus_per_task=self._options.cpus_per_task,
            mem_per_cpu_gb=self._options.mem_per_cpu_gb,
        ).run()
