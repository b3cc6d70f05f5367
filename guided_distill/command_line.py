"""The flags of the command line, and one line for each way of mistyping them.

A flag that not every mode takes begins its help with the modes that do.
"""

import pathlib
import re

from absl import flags
from ml_collections import config_flags

from guided_distill import config_files
from guided_distill.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "An experiment: a file with get_config(), or the name of one; --config.key=value overrides."
)


class _ConfigParser(config_flags.config_flags.ConfigFileFlagParser):
    """Loads a config file from where `config_files` finds it."""

    def parse(self, path):
        try:
            return super().parse(config_files.find(path))
        except (TypeError, ValueError) as error:  # its last line is what get_config raised
            reason = re.sub(r"^\w+Error: ", "", str(error).strip().splitlines()[-1])
            said = config_files.why_not(path, reason)
            raise UserError(reason if said == reason else f"--config={path}: {said}") from error


flags.FLAGS["config"].parser = _ConfigParser("config")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; runs/<stem of the config> by default.")
_MODES = [
    "run", "evaluate", "reference", "sample", "transfer", "prepare_data", "encode", "import", "export", "plan",
]  # fmt: skip
MODE = flags.DEFINE_enum("mode", "run", _MODES, "What to do.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "The same as --mode=plan, without --compile.")
TOPOLOGY = flags.DEFINE_string("topology", None, "plan: for chips like v5e:16x16 or h100:8; those at hand by default.")
COMPILE = flags.DEFINE_bool("compile", False, "plan: compile every train step and sampler too; a large one takes long.")
PROFILE = flags.DEFINE_integer("profile", 0, "run: how many updates of each stage leave a trace for XProf.")
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "host:port of process 0, where there are several processes; auto: as JAX finds it out. Not needed on SLURM, under "
    "Open MPI up to 4 and on TPU slices of GKE; under Open MPI 5 it is enough by itself.",
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which of them this one is, from 0.")
NUM_STEPS = flags.DEFINE_integer("num_steps", 4, "sample: network evaluations per image.")
SERIES = flags.DEFINE_string(
    "series",
    None,
    "sample: the series of the student (det, sto, two, tract, consistency, or det_w1 of one w); the first trained by "
    "default.",
)
W = flags.DEFINE_float("w", 1.0, "sample, transfer: guidance strength.")
LABELS = flags.DEFINE_list("labels", None, "sample: classes, repeated over the images; drawn from the seed by default.")
CAPTIONS = flags.DEFINE_multi_string("caption", None, "sample: what to show, of a model of captions; repeatable.")
IMAGE = flags.DEFINE_string("image", None, "sample: a picture of the model's size to make others of.")
START = flags.DEFINE_integer("start", None, "sample: evaluations from --image; the fewer, the more of it is kept.")
MASK = flags.DEFINE_string("mask", None, "sample: what to make anew of --image: white, and greys from 128 on.")
TO_SEED = flags.DEFINE_integer("to_seed", None, "sample: pictures on the way from the noise of --seed to that of this.")
TO_W = flags.DEFINE_float("to_w", None, "sample: pictures on the way from --w to this.")
TARGET = flags.DEFINE_string("target", None, "transfer: the workdir of the run whose domain is drawn in.")
SAMPLES = flags.DEFINE_string(
    "samples", None, "evaluate: a folder of pictures or an npz to measure in place of a run, or data:test."
)
NUM = flags.DEFINE_integer("num", 64, "sample: how many images.")
SEED = flags.DEFINE_integer("seed", 0, "sample: image k depends on (seed, k), its label and w alone.")
NETWORK = flags.DEFINE_string(
    "network",
    None,
    "import: the feature network, efficientnet_lite0 or inception_v3, or the kind of latent model that a single file "
    "holds (sd1, sd1_inpainting, sd2_base, sd2_768, ldm_imagenet256).",
)
SOURCE = flags.DEFINE_string(
    "source",
    None,
    "import, encode: what to import, a feature network's weights as published, those of an installed package by "
    "default; a latent model's folder as diffusers writes it, or its single file. What to make latents of, a prepared "
    "TFDS set or folder:DIR of pictures with captions (.txt) or classes, as files or in webdataset shards (.tar).",
)
UNET = flags.DEFINE_string(
    "unet",
    None,
    "import: a file of a U-Net alone, under the keys of diffusers, in place of that of the folder --source; one that "
    "takes w is a config.stage1.checkpoint.",
)
OUT = flags.DEFINE_string(
    "out",
    None,
    "sample, export, import: of samples grid.png (samples.png by default), or samples.npz with x, label, index; of an "
    "export or a latent model a directory.",
)
FORMATS = flags.DEFINE_list("formats", ["bundle"], "export: bundle, stablehlo, onnx, diffusers.")
STAGES = flags.DEFINE_list(
    "stages", None, "export: as stage2_det_0004; by default the deterministic students of 1, 2, 4 and 8 steps."
)
WITH_TEACHER = flags.DEFINE_bool("with_teacher", False, "export: the teacher too.")
LICENCE = flags.DEFINE_string("licence", None, "export: that of the weights and of their data, for the model card.")


def parse(argv):
    """Parses the flags. ml_collections and absl raise what they like for a mistake: each becomes one line."""
    try:
        rest = flags.FLAGS(argv)
        if rest[1:]:
            raise UserError(f"unknown argument {rest[1]!r}; see --help")
        _check_mode()
        if MODE.value != "import":
            _check_config()
    except (UserError, SystemExit):
        raise
    except Exception as error:
        raise UserError(_one_line(error, argv)) from error


def _check_mode():
    if DRY_RUN.value and MODE.value == "import":
        raise UserError("--dry_run plans what a config trains; --mode=import has none, so leave one of them out")
    modes = {MODE.value, *(["plan"] if DRY_RUN.value else [])}
    for name in flags.FLAGS:
        takers = modes_of(flags.FLAGS[name].help or "")
        if flags.FLAGS[name].present and takers and not modes & set(takers):
            raise UserError(f"--{name} is for --mode={' and --mode='.join(takers)}; give that mode, or drop it")


def modes_of(text):
    """The modes that a flag's help begins with; [] where every mode takes it."""
    words = re.match(r"([a-z_]+(?:, [a-z_]+)*): ", text)
    return [word for word in words[1].split(", ") if word in _MODES] if words else []


def _check_config():
    if CONFIG.value is None:
        raise UserError("--config is missing: --config=configs/digits.py, for one")
    CONFIG.value.to_dict()  # a config that could not be loaded says so only when it is asked for its value


def _one_line(error, argv):
    """What is wrong with the flags: the argument it is about, where that can be told, and the reason."""
    reason = str(error).strip().splitlines()[-1].strip()
    if isinstance(error, KeyError | AttributeError):
        reason = reason.strip("\"'")
        about = [argument for argument in argv[1:] if f".{reason}" in argument.split("=")[0]]
        return f"{about[0] if about else reason}: no such key in the config"
    return reason


def integers(flag, words):
    """Whole numbers from the words of a list flag. Raises UserError that names the flag."""
    try:
        numbers = [int(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers:
        raise UserError(f"{flag}={','.join(words)}: must be whole numbers with commas between them")
    return numbers


def default_workdir():
    """runs/<stem of the config>, with the variant of a config that has some: configs/x.py:y -> runs/x_y."""
    path, _, variant = flags.FLAGS["config"].config_filename.partition(":")
    return f"runs/{pathlib.Path(path).stem}{'_' * bool(variant)}{variant}"
