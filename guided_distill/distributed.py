"""Several processes as one run: found out from the cluster's environment, or told; and of one mind about files."""

import json
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from guided_distill.errors import Fault, UserError


def initialise(coordinator=None, num_processes=None, process_id=None):
    """Connects this process with the others, before the first use of a device. Does nothing for a single process."""
    arguments = arguments_of(coordinator, num_processes, process_id, os.environ)
    if arguments is not None:
        try:
            jax.distributed.initialize(**arguments)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the processes cannot be brought together ({reason}); see --coordinator") from error


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


def of_main(tree):
    """A tree of host arrays as process 0 has it, on every process."""
    return multihost_utils.broadcast_one_to_all(tree) if several() else tree


def arguments_of(coordinator, num_processes, process_id, environment):
    """Arguments of `jax.distributed.initialize`: {} where JAX finds them out itself, None for a single process.

    `coordinator` is "host:port" of process 0, "auto", or None. Raises UserError where something is missing.
    """
    told = {"--num_processes": num_processes, "--process_id": process_id}
    if coordinator in (None, "auto"):
        for flag, value in told.items():
            if value is not None:
                raise UserError(f"{flag}={value} needs --coordinator=host:port, the address of process 0")
        return {} if coordinator == "auto" or _is_cluster(environment) else None
    for flag, value in told.items():
        if value is None:
            raise UserError(f"--coordinator={coordinator} needs {flag}")
    if not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={coordinator}: must be host:port, such as 10.0.0.2:1234")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}: must be one of 0 ... {num_processes - 1}")
    return {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}


def _is_cluster(environment):
    """Whether this is one of several processes, as SLURM's srun, Open MPI's mpirun or GKE's TPU slices tell theirs."""
    several = (
        int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1,
        int(environment.get("OMPI_COMM_WORLD_SIZE") or 1) > 1,
        "," in environment.get("TPU_WORKER_HOSTNAMES", ""),
        "MEGASCALE_COORDINATOR_ADDRESS" in environment,
    )
    return any(several)
