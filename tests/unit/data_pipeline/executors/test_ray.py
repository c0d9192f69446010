"""The Ray executor where there is no cluster, or none that is large enough; what messages say then works."""

import json
import re
import socket
import sys
from types import SimpleNamespace

import pytest

from configs.data_run import DataRunConfig, RayConfig
from configs.loader import ConfigError
from data_pipeline.executors.choose import choose
from data_pipeline.executors.ray_executor import too_small


@pytest.mark.parametrize(
    ("nodes", "wanted", "messages"),
    [
        ([{"CPU": 4, "memory": 9 * 2**30}], {"cpus_per_task": 2, "mem_per_cpu_gb": 4.5}, 0),
        ([{"CPU": 4, "memory": 7 * 2**30}], {"cpus_per_task": 2, "mem_per_cpu_gb": 9}, 1),
        ([{"CPU": 4.0, "memory": 7e9}, {"CPU": 2.0, "memory": 9e9}], {"cpus_per_task": 6, "mem_per_cpu_gb": 3}, 2),
        ([{"CPU": 8, "memory": 7e9}, {"CPU": 2, "memory": 90e9}], {"cpus_per_task": 4, "mem_per_cpu_gb": 8}, 1),
    ],
)
def test_a_task_of_the_size_that_the_message_says_fits_a_node_of_ray(
    nodes: list[dict[str, float]], wanted: dict[str, float], messages: int
) -> None:
    said = 0
    while message := too_small(nodes, RayConfig.model_validate(wanted)):
        name, value = re.findall(r"set run\.ray\.(\w+)=([\d.]+)$", message)[0]
        assert float(value) < wanted[name]
        wanted, said = wanted | {name: json.loads(value)}, said + 1
        if name == "cpus_per_task":
            assert f", and no node of Ray has more than {value} cores; set" in message
    assert said == messages
    assert any(node["CPU"] >= wanted["cpus_per_task"] for node in nodes)


def test_a_ray_without_cluster_is_told_and_this_machine_does_as_the_message_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replaces Ray, which may not be installed, with what `init` and `nodes` do without a cluster and with one."""
    begun: list[str] = []

    def init(address: str, **options: object) -> None:
        begun.append(address)
        if address != "local":
            raise ConnectionError("Could not find any running Ray instance.\nPlease specify the one to connect to")

    nodes = [{"Alive": True, "Resources": {"CPU": 2.0, "memory": 9e9}}]
    ray = SimpleNamespace(init=init, nodes=lambda: nodes, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    said = r"no Ray cluster answers \(.+\); start one with `ray start --head`, .* or leave run\.ray\.address out"
    for address in ("auto", f"127.0.0.1:{free}", f"ray://127.0.0.1:{free}"):
        executor = choose(DataRunConfig(dir="x", executor="ray", ray=RayConfig(address=address)))
        with pytest.raises(ConfigError, match=rf"run\.ray\.address = '{address}': {said}"), executor:
            pass
    assert begun == ["auto"], "Ray itself would try for minutes where nothing answers"
    with choose(DataRunConfig(dir="x", executor="ray")):
        assert begun == ["auto", "local"]


def test_a_task_fits_once_ray_has_nodes_with_room_as_the_message_says() -> None:
    options = RayConfig(cpus_per_task=2, mem_per_cpu_gb=1)
    for wrong in ([], [{"memory": 9e9}]):
        assert too_small(wrong, options).endswith("no node of Ray has more than 0 cores; start nodes with cores")
    assert too_small([{"CPU": 2, "memory": 0}], options).endswith("has more than 0.0; start nodes with memory")
    assert not too_small([{"CPU": 2, "memory": 9e9}], options)
