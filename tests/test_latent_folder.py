"""--mode=import of latent models: what goes in comes out of our own folder, and each mistake gets one line."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_latent_imports import MODELS, random_params, refused

from guided_distill.interop import command, compvis, diffusers_folder, diffusers_names
from guided_distill.interop.latent_folder import read_latent, write_latent
from guided_distill.interop.tensors import export_tree
from guided_distill.models.latent_models import LATENT_MODELS

REPO = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["sd1", "student", "ldm"])
def test_a_model_comes_back_bit_for_bit(name, tmp_path):
    model, params = MODELS[name], random_params(MODELS[name])
    write_latent(tmp_path, model, params)
    again, read = read_latent(tmp_path)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert read_latent(tmp_path, ["unet"])[1].keys() == {"unet"}


def test_the_command_line_imports_a_folder_and_the_unet_of_a_file(tmp_path):
    plain, student = MODELS["sd1"], dataclasses.replace(MODELS["student"], parameterisation="eps")
    params, distilled = random_params(plain), random_params(student, seed=1)["unet"]
    diffusers_folder.write_diffusers(tmp_path / "theirs", plain, params)
    state = export_tree(diffusers_names.unet(student.unet), distilled)
    safetensors.numpy.save_file(state, tmp_path / "distilled.safetensors")
    program = [sys.executable, "-m", "guided_distill.main", "--mode=import", f"--source={tmp_path / 'theirs'}"]
    program += [f"--unet={tmp_path / 'distilled.safetensors'}", f"--out={tmp_path / 'ours'}"]
    done = subprocess.run(program, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert done.returncode == 0 and "predicts eps, latents of 64" in done.stdout, done.stderr
    assert "theirs with the U-Net of" in done.stdout
    model, read = read_latent(tmp_path / "ours")
    assert model == student
    jax.tree.map(np.testing.assert_array_equal, read, params | {"unet": distilled})


def test_the_command_imports_a_single_file(tmp_path, monkeypatch):
    monkeypatch.setitem(LATENT_MODELS, "ldm", MODELS["ldm"])
    params = random_params(MODELS["ldm"])
    compvis.write_compvis(tmp_path / "a.safetensors", MODELS["ldm"], params)
    command.import_weights("ldm", str(tmp_path / "a.safetensors"), str(tmp_path / "ours"))
    jax.tree.map(np.testing.assert_array_equal, read_latent(tmp_path / "ours")[1], params)


def test_what_is_wrong_with_the_command_is_named(tmp_path):
    refused("must be one of efficientnet_lite0, .*, or --source a folder", command.import_weights, "sd9", None, None)
    refused("--source is missing: the file that holds sd1", command.import_weights, "sd1", None, None)
    refused("--unet=u.pt: give --source=FOLDER too", command.import_weights, None, None, None, "u.pt")
    (tmp_path / "a.ckpt").write_bytes(b"PK")
    refused("--unet=u.pt: give --source=", command.import_weights, "sd1", str(tmp_path / "a.ckpt"), None, "u.pt")
    refused("a folder says itself", command.import_weights, "sd1_kind", str(tmp_path), None)
    diffusers_folder.write_diffusers(tmp_path, MODELS["sd1"], random_params(MODELS["sd1"]))
    refused("--out is missing", command.import_weights, None, str(tmp_path), None)


def test_what_is_wrong_with_our_own_folder_is_named(tmp_path):
    refused("config.json is missing", read_latent, tmp_path)
    write_latent(tmp_path, MODELS["sd1"], random_params(MODELS["sd1"]))
    (tmp_path / "autoencoder.safetensors").unlink()
    refused("autoencoder.safetensors is missing", read_latent, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | {"unet": said["unet"] | {"channels": 8}}))
    refused("does not hold the unet", read_latent, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(said | {"unet": said["unet"] | {"colour": 8}}))
    refused("not this version's .*colour", read_latent, tmp_path)
