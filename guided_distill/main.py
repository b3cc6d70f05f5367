"""The command line: python -m guided_distill.main --config=configs/digits.py [--workdir=DIR] [--config.key=value]."""

import logging
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from guided_distill.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "An experiment: a file with get_config(); --config.key=value overrides."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; runs/<stem of the config> by default.")
_MODE = flags.DEFINE_enum("mode", "run", ["run", "evaluate", "sample", "prepare_data"], "What to do.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the stages, parameters and memory, and stop.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 4, "sample: network evaluations per image.")
_W = flags.DEFINE_float("w", 1.0, "sample: guidance strength.")
_LABELS = flags.DEFINE_list(
    "labels", None, "sample: classes, repeated over the images; drawn from the seed by default."
)
_NUM = flags.DEFINE_integer("num", 64, "sample: how many images.")
_SEED = flags.DEFINE_integer("seed", 0, "sample: image k depends on (seed, k), its label and w alone.")
_OUT = flags.DEFINE_string("out", "samples.png", "sample: grid.png, or samples.npz with arrays x, label, index.")


def _parse(argv):
    """Parses the flags. ml_collections and absl raise what they like for a mistake: each becomes one line."""
    try:
        rest = flags.FLAGS(argv)
        if rest[1:]:
            raise UserError(f"unknown argument {rest[1]!r}; see --help")
        if _CONFIG.value is None:
            raise UserError("--config is missing: --config=configs/digits.py, for one")
        filename = flags.FLAGS["config"].config_filename
        if not pathlib.Path(filename.split(":")[0]).exists():
            raise UserError(f"--config={filename}: no such file")
        _CONFIG.value.to_dict()  # a config that could not be loaded says so only when it is asked for its value
    except (UserError, SystemExit):
        raise
    except Exception as error:
        raise UserError(_one_line(error, argv)) from error


def _one_line(error, argv):
    """What is wrong with the flags: the argument it is about, where that can be told, and the reason."""
    reason = str(error).strip().splitlines()[-1].strip()
    if isinstance(error, KeyError | AttributeError):
        reason = reason.strip("\"'")
        about = [argument for argument in argv[1:] if f".{reason}" in argument.split("=")[0]]
        return f"{about[0] if about else reason}: no such key in the config"
    return reason


def _integers(flag, words):
    try:
        numbers = [int(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers:
        raise UserError(f"{flag}={','.join(words)}: must be whole numbers with commas between them")
    return numbers


def _dispatch():
    # Imported here: a mistyped flag should not wait for JAX.
    from guided_distill import pipeline, plan, prepare_data, sample
    from guided_distill.experiment import from_config

    config = _CONFIG.value.to_dict()
    workdir = _WORKDIR.value or str(pathlib.Path("runs") / pathlib.Path(flags.FLAGS["config"].config_filename).stem)
    if _DRY_RUN.value:
        plan.dry_run(config)
    elif _MODE.value == "run":
        pipeline.run(config, workdir)
    elif _MODE.value == "evaluate":
        pipeline.evaluate_run(config, workdir)
    elif _MODE.value == "prepare_data":
        prepare_data.prepare(from_config(config).data)
    else:
        labels = None if _LABELS.value is None else _integers("--labels", _LABELS.value)
        sample.sample(
            config,
            workdir,
            num_steps=_NUM_STEPS.value,
            w=_W.value,
            labels=labels,
            num=_NUM.value,
            seed=_SEED.value,
            out=_OUT.value,
        )


def main(argv=None):
    """Runs the command line; returns the exit code: 2, and one line on stderr, for a mistake of the user."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        _parse(sys.argv if argv is None else argv)
        _dispatch()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
