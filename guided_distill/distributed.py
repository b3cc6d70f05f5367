"""Several processes as one run: found out from the cluster's environment, or told; and of one mind about files."""

import json
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from guided_distill.errors import Fault, UserError

_OPEN_MPI = {
    "num_processes": "OMPI_COMM_WORLD_SIZE",
    "process_id": "OMPI_COMM_WORLD_RANK",
    "local_device_ids": "OMPI_COMM_WORLD_LOCAL_RANK",  # a GPU for each process, as JAX has it where it finds all out
}


def initialise(coordinator=None, num_processes=None, process_id=None):
    """Connects this process with the others, before the first use of a device. Does nothing for a single process."""
    arguments = arguments_of(coordinator, num_processes, process_id, os.environ)
    if arguments is not None:
        try:
            jax.distributed.initialize(**arguments)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"the processes cannot be brought together ({reason}); {_remedy(arguments, os.environ)}"
            ) from error


def _remedy(arguments, environment):
    if arguments:
        return "see --coordinator"
    others = "" if _OPEN_MPI["process_id"] in environment else ", with --num_processes and --process_id"
    return f"say where process 0 is: --coordinator=host:port{others}"


def several():
    """Whether there are other processes."""
    return jax.process_count() > 1


def is_main():
    """Whether this process is the one that writes the files."""
    return jax.process_index() == 0


def agreed(make):
    """What make() says on process 0, a JSON value, on every process; a UserError or Fault that it raises there too.

    For whatever is read from files, which process 0 writes: each process for itself might read before or after that.
    """
    if not several():
        return make()
    said = {}
    if is_main():
        try:
            said = {"value": make()}
        except (UserError, OSError) as error:
            said = {"error": str(error), "users": type(error) is UserError}
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    said = json.loads(np.asarray(text, np.uint8).tobytes())
    if "error" in said:
        raise (UserError if said["users"] else Fault)(said["error"])
    return said["value"]


def total(number):
    """The sum of the numbers that the processes have, on every process, once all are there."""
    return int(multihost_utils.process_allgather(np.int32(number)).sum()) if several() else number


def of_main(tree):
    """A tree of host arrays as process 0 has it, on every process."""
    return multihost_utils.broadcast_one_to_all(tree) if several() else tree


def arguments_of(coordinator, num_processes, process_id, environment):
    """Arguments of `jax.distributed.initialize`: {} where JAX finds them out itself, None for a single process.

    `coordinator` is "host:port" of process 0, "auto", or None; under Open MPI the address alone is enough, which its
    version 5 does not tell. Raises UserError where something is missing.
    """
    told = {"num_processes": num_processes, "process_id": process_id}
    if coordinator in (None, "auto"):
        for name, value in told.items():
            if value is not None:
                raise UserError(f"--{name}={value} needs --coordinator=host:port, the address of process 0")
        return {} if coordinator == "auto" or _is_cluster(environment) else None
    if set(told.values()) == {None} and environment.keys() >= {*_OPEN_MPI.values()}:
        told = {name: int(environment[variable]) for name, variable in _OPEN_MPI.items()}
    for name, value in told.items():
        if value is None:
            raise UserError(f"--coordinator={coordinator} needs --{name}")
    if not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={coordinator}: must be host:port, such as 10.0.0.2:1234")
    if not 0 <= told["process_id"] < told["num_processes"]:
        raise UserError(f"--process_id={told['process_id']}: must be one of 0 ... {told['num_processes'] - 1}")
    return {"coordinator_address": coordinator, **told}


def _is_cluster(environment):
    """Whether this is one of several processes, as SLURM's srun, Open MPI's mpirun or GKE's TPU slices tell theirs."""
    several = (
        int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1,
        int(environment.get(_OPEN_MPI["num_processes"]) or 1) > 1,
        "," in environment.get("TPU_WORKER_HOSTNAMES", ""),
        "MEGASCALE_COORDINATOR_ADDRESS" in environment,
    )
    return any(several)
