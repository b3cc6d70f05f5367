"""--mode=import: weights of others converted once, by what --network and --source name."""

import pathlib

from guided_distill.errors import UserError
from guided_distill.interop import compvis, diffusers_folder, feature_weights, latent_folder, salimans_ho
from guided_distill.models.latent_models import LATENT_MODELS


def import_weights(network, source, out, unet=None):
    """Converts a feature network into the cache, or a latent model into the folder `out`, and says so.

    A latent model's `source` is a folder of diffusers, or a single file of the kind LATENT_MODELS[network]; a file
    `unet` stands for the U-Net of a folder. Raises UserError for what is missing or does not fit.
    """
    path = None if source is None else pathlib.Path(source).expanduser()
    _check_kind(path, unet)
    if network in LATENT_MODELS and (path is None or not path.is_dir()):
        if path is None:
            raise UserError(f"--source is missing: the file that holds {network}")
        model, params = compvis.read_compvis(path, network)
    elif path is not None and path.is_dir():
        if network is not None:
            raise UserError(f"--network={network}: a folder says itself what it holds; leave --network away")
        model, params = diffusers_folder.read_diffusers(path, unet)
    elif network in feature_weights.SOURCES:
        feature_weights.import_weights(network, source)
        return
    else:
        known = ", ".join([*feature_weights.SOURCES, *LATENT_MODELS])
        raise UserError(f"--network={network}: must be one of {known}, or --source a folder of diffusers")
    if out is None:
        raise UserError("--out is missing: the folder that the converted model goes to")
    tokenizer = path / "tokenizer" if (path / "tokenizer").is_dir() else None
    latent_folder.write_latent(out, model, params, tokenizer)
    what = path if unet is None else f"{path} with the U-Net of {unet}"
    print(f"{latent_folder.describe(model, params)}: {what} is now in {out}")
    if model.text_encoder is not None and tokenizer is None:
        print(f"{path} has no tokenizer: put vocab.json and merges.txt of its text encoder into {out}/tokenizer")


def _check_kind(path, unet):
    if unet is not None and not (path is not None and path.is_dir()):
        raise UserError(f"--unet={unet}: give --source=FOLDER too, of diffusers, with all else that the model has")
    if path is not None and path.is_file() and salimans_ho.looks_like_one(path):
        raise UserError(
            f"{path} is a checkpoint of Flax, as those of diffusion_distillation (Salimans & Ho) are; these need no "
            f"import: --config.teacher.checkpoint={path} reads them"
        )
