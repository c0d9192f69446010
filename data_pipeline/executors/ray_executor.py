"""Ray actors: on a running cluster, or on a Ray that is started on this machine for the run.

datatrove's RayPipelineExecutor hands out the tasks. It logs a failed one and goes on; here the failure that the task
left on file is raised. Ray is an extra, loaded when a run asks for it. Leaves out nodes without the run directory, and
tasks that Ray starts again after it lost a worker: those end the stage.
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
    """A pipeline with its tasks, as datatrove submits it."""


class RayExecutor(Executor):
    def __init__(self, options: RayConfig, workers: int) -> None:
        # Read when Ray is imported: it would report its use to its makers.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "run.executor = ray needs the package ray; run: pip install -c constraints.txt '.[ray]', or take "
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
        self._fits()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()

    def _fits(self) -> None:
        """Errors: ConfigError where no task could ever start; Ray would wait for the cluster to grow."""
        needs = {"CPU": self._options.cpus_per_task, "memory": self._memory()}
        for name, amount in needs.items():
            most = max((node["Resources"].get(name, 0) for node in self._ray.nodes() if node["Alive"]), default=0)
            if amount > most:
                self._ray.shutdown()
                raise ConfigError(
                    f"run.ray asks for {amount:,.0f} of {name} a task, and no node of the Ray cluster has more than "
                    f"{most:,.0f}; lower run.ray.cpus_per_task or run.ray.mem_per_cpu_gb"
                )

    def _memory(self) -> float:
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
