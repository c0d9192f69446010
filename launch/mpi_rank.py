"""`mpirun -n N python -m launch.mpi_rank MODULE ARGS...`: one rank of mpirun, which asks MPI itself for its number.

Any MPI that mpi4py loads will do, since no variable of a particular mpirun is read. Rank 0 tells the others where ranks
meet. MPI is finished again before this process becomes `python -m launch.bootstrap MODULE ARGS...`, with torchrun's
variables: training exchanges tensors by gloo or NCCL, not by MPI. Data runs use MPI for their tasks and are not started
through this module.
"""

import os
import socket
import sys

from configs.loader import ConfigError
from launch.environment import ClusterEnvironment, mpi_rank_and_world
from launch.processes import cores
from launch.ranks import free_port


def main() -> None:
    """Finds this rank's number among all and becomes the module that the first argument names."""
    try:
        env_of_rank = find_rank()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // env_of_rank.local_world_size)))
    env = {**os.environ, **env_of_rank.as_variables(), "OMP_NUM_THREADS": threads}
    os.execve(sys.executable, [sys.executable, "-m", "launch.bootstrap", *sys.argv[1:]], env)


def find_rank() -> ClusterEnvironment:
    """Returns this process's rank in the world of MPI, which is begun and ended here.

    Raises ConfigError if the mpirun that started it belongs to another MPI than the one that mpi4py loads.
    """
    import mpi4py

    mpi4py.rc.initialize = False  # begun and ended below
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"mpi4py finds no MPI library ({error}); load the cluster's MPI, or pip install mpich"
        ) from None
    MPI.Init()
    world = MPI.COMM_WORLD
    _, started = mpi_rank_and_world()
    if world.Get_size() == 1 < started:
        raise ConfigError(
            f"{started} ranks were started, but MPI sees 1: this mpirun does not belong to the MPI library that mpi4py "
            "loaded; use that library's mpirun, or name its library in MPI4PY_LIBMPI"
        )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    first_of_nodes = sorted(set(world.allgather(node.bcast(world.Get_rank(), root=0))))
    one_node = len(first_of_nodes) == 1
    meeting = None
    if world.Get_rank() == 0:
        host = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if one_node else socket.gethostname())
        meeting = (host, int(os.environ.get("MASTER_PORT") or free_port()))
    address, port = world.bcast(meeting, root=0)
    env_of_rank = ClusterEnvironment(
        launcher="torchrun",
        rank=world.Get_rank(),
        world_size=world.Get_size(),
        local_rank=node.Get_rank(),
        local_world_size=node.Get_size(),
        node_rank=first_of_nodes.index(node.bcast(world.Get_rank(), root=0)),
        master_address=address,
        master_port=port,
    )
    MPI.Finalize()
    return env_of_rank


if __name__ == "__main__":
    main()
