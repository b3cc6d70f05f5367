"""The command line: guided-distill, or python -m guided_distill.main, --config=digits [--workdir=DIR] [...]."""

import logging
import os
import signal
import sys

from guided_distill import command_line as flag
from guided_distill.errors import Fault, Stopped, UserError

_OF_SEVERAL = ("run", "evaluate", "sample", "encode")  # modes that several processes do together


def _dispatch():
    # Imported here: a mistyped flag should not wait for JAX.
    if flag.MODE.value == "import":
        from guided_distill.interop import command

        command.import_weights(flag.NETWORK.value, flag.SOURCE.value, flag.OUT.value, flag.UNET.value)
        return
    config = flag.CONFIG.value.to_dict()
    if flag.MODE.value == "plan" or flag.DRY_RUN.value:
        _plan(config)
        return
    from guided_distill import (
        compilation,
        distributed,
        encode,
        measure_files,
        pipeline,
        preemption,
        prepare_data,
        transfer,
    )
    from guided_distill.experiment import from_config

    compilation.keep_programs()
    distributed.initialise(flag.COORDINATOR.value, flag.NUM_PROCESSES.value, flag.PROCESS_ID.value)
    preemption.listen()
    if distributed.several() and (flag.MODE.value not in _OF_SEVERAL or flag.SAMPLES.value is not None):
        what = "--samples" if flag.MODE.value in _OF_SEVERAL else f"--mode={flag.MODE.value}"
        raise UserError(f"{what} is for one process; start it without --coordinator, and outside srun and mpirun")
    if flag.PROFILE.value < 0:
        raise UserError(f"--profile={flag.PROFILE.value}: must be a number of updates")
    workdir = flag.WORKDIR.value or flag.default_workdir()
    experiment = from_config(config)
    if flag.MODE.value == "run":
        pipeline.run(config, workdir, trace_updates=flag.PROFILE.value)
    elif flag.MODE.value == "evaluate" and flag.SAMPLES.value is not None:
        measure_files.measure_files(config, workdir, flag.SAMPLES.value)
    elif flag.MODE.value == "reference":
        measure_files.make_references(config, workdir)
    elif flag.MODE.value == "evaluate":
        pipeline.evaluate_run(config, workdir)
    elif flag.MODE.value == "prepare_data":
        prepare_data.prepare(experiment.data)
    elif flag.MODE.value == "encode":
        if flag.SOURCE.value is None:
            raise UserError("--source is missing: folder:DIR of pictures and captions, or the name of a TFDS set")
        encode.encode(config, flag.SOURCE.value)
    elif flag.MODE.value == "transfer":
        if flag.TARGET.value is None:
            raise UserError("--target is missing: the workdir of the run whose domain is drawn in")
        transfer.transfer(config, workdir, target=flag.TARGET.value, w=flag.W.value)
    elif flag.MODE.value == "export":
        _export(config, workdir)
    else:
        _sample(config, workdir)


def _plan(config):
    if flag.TOPOLOGY.value is not None:
        # Chips that are somewhere else: none of this machine is taken, nor a lock on its TPU compiler.
        os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
        # Without these libtpu looks for the TPU it is on, and says at length that there is none.
        os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost")
    from guided_distill import plan

    compiling = flag.COMPILE.value and not flag.DRY_RUN.value
    plan.dry_run(config, topology=flag.TOPOLOGY.value, compiling=compiling)


def _sample(config, workdir):
    from guided_distill import sample

    labels = None if flag.LABELS.value is None else flag.integers("--labels", flag.LABELS.value)
    sample.sample(
        config,
        workdir,
        num_steps=flag.NUM_STEPS.value,
        series=flag.SERIES.value,
        w=flag.W.value,
        labels=labels,
        num=flag.NUM.value,
        seed=flag.SEED.value,
        out=flag.OUT.value or "samples.png",
        captions=flag.CAPTIONS.value,
        begin=sample.From(flag.IMAGE.value, flag.START.value, flag.MASK.value, flag.TO_SEED.value, flag.TO_W.value),
    )


def _export(config, workdir):
    from guided_distill.export import command

    command.export(
        config,
        workdir,
        formats=flag.FORMATS.value,
        stages=flag.STAGES.value,
        with_teacher=flag.WITH_TEACHER.value,
        licence=flag.LICENCE.value,
        out=flag.OUT.value,
    )


def main(argv=None):
    """Runs the command line; returns the exit code, as README.md lists them, with one line on stderr where not 0."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        flag.parse(sys.argv if argv is None else argv)
        _dispatch()
    except UserError as error:
        return _say(f"error: {error}", error.exit_code)
    except OSError as error:
        what = ": ".join(map(str, filter(None, [error.filename, error.strerror or str(error)])))
        return _say(f"error: {what}; what was saved is kept, and the same command goes on from there", Fault.exit_code)
    except Stopped:
        return _say("stopped as told; the same command goes on from here", Stopped.exit_code)
    except KeyboardInterrupt:
        return _say("interrupted; the same command goes on from the newest checkpoint", 128 + signal.SIGINT)
    return 0


def _say(line, exit_code):
    print(line, file=sys.stderr)
    return exit_code


def _leave(exit_code):
    """Ends the process; after a fault without JAX's farewell, which waits for processes that wait for this one."""
    jax = sys.modules.get("jax")
    if exit_code not in (0, Stopped.exit_code) and jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def console():
    """The command `guided-distill`: as `python -m guided_distill.main`, where one's own modules are found first."""
    sys.path.insert(0, os.getcwd())
    _leave(main())


if __name__ == "__main__":
    _leave(main())
