"""The machine as a training run finds it: versions, devices, cores, limits and shared memory."""

import platform
import resource
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launch.processes import cores
from pretrain.doctor.findings import Finding, failure, ok, warning

PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy")
PYTHONS = ("3.11", "3.12", "3.13")
LEAST_FILES = 4096  # open files of a process: sockets to all ranks, token stores, checkpoint files
SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
LEAST_SHARED = 2**30  # bytes that NCCL may need for the GPUs of a machine


def machine(ranks: int) -> Iterator[Finding]:
    """Looks at this machine for a run of `ranks` ranks on it."""
    yield from _versions()
    yield from _devices(ranks)
    yield from _limits()
    yield _shared_memory()


def devices_here() -> int:
    """Returns how many ranks have a device of their own here: GPUs, or cores if there are none."""
    import torch

    return torch.cuda.device_count() or cores()


def _versions() -> Iterator[Finding]:
    python = ".".join(platform.python_version_tuple()[:2])
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            yield failure(f"{name} is not installed", "run `make install`, or pip install -c constraints.txt")
    said = f"Python {python}, {', '.join(found)}"
    if python in PYTHONS:
        yield ok(said)
    else:
        yield warning(said, f"Trivium is tested with Python {', '.join(PYTHONS)}")


def _devices(ranks: int) -> Iterator[Finding]:
    import torch

    count = torch.cuda.device_count()
    if not count:
        own = cores()
        said = f"no GPU; {ranks} rank{'s' * (ranks > 1)} on {own} core{'s' * (own > 1)}"
        if ranks > own:
            yield warning(said, f"ranks will take turns; start at most {own}")
        else:
            yield ok(said)
        return
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    said = f"{count} GPUs: {', '.join(dict.fromkeys(names))}"
    if ranks > count:
        yield failure(
            f"{said}, and {ranks} ranks",
            f"start at most {count} here, or set parallel.backend=gloo to share one slowly",
        )
    elif len(set(names)) > 1:
        yield warning(said, "the slowest sets the pace; choose equal ones by CUDA_VISIBLE_DEVICES")
    else:
        yield ok(said)
    for index in range(min(ranks, count)):
        free, total = torch.cuda.mem_get_info(index)
        if free < 0.95 * total:
            yield warning(
                f"GPU {index} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
                "another process uses it: nvidia-smi lists them",
            )


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = f"{soft:,} open files are allowed"
    if soft == resource.RLIM_INFINITY or soft >= LEAST_FILES:
        yield ok(said if soft != resource.RLIM_INFINITY else "any number of open files is allowed")
    else:
        is_free = hard == resource.RLIM_INFINITY or hard >= LEAST_FILES
        limit = "" if is_free else f", which only an administrator may set above {hard:,}"
        yield warning(said, f"many ranks and shards need more: ulimit -n {LEAST_FILES}{limit}")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and any(INFINIBAND.glob("*")):
        yield warning(
            f"{locked / 2**20:.0f} MiB of memory may be locked",
            "InfiniBand needs it without limit: ulimit -l unlimited, or memlock in limits.conf",
        )


def _shared_memory() -> Finding:
    if not SHARED_MEMORY.is_dir():
        return ok("no /dev/shm, which only NCCL on one machine needs")
    free = shutil.disk_usage(SHARED_MEMORY).free
    said = f"{free / 2**30:.1f} GiB of shared memory are free in {SHARED_MEMORY}"
    if free < LEAST_SHARED:
        return warning(said, "NCCL may need more: give the container --shm-size=8g, or remove files there")
    return ok(said)
