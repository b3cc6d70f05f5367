"""Several processes as one run: found out from the cluster's environment, or told."""

import os

import jax

from guided_distill.errors import UserError


def initialise(coordinator=None, num_processes=None, process_id=None):
    """Connects this process with the others, before the first use of a device. Does nothing for a single process."""
    arguments = arguments_of(coordinator, num_processes, process_id, os.environ)
    if arguments is not None:
        jax.distributed.initialize(**arguments)


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
