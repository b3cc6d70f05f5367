"""From a pipeline that diffusers wrote to students that diffusers runs: the whole chain, from a folder on disk."""

import itertools
import sys
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch_modules import shake

sys.path.insert(0, str(Path(__file__).parents[1]))
import plain_features
from latent_run import MODEL, PAINTS_IN, latent_config, write_pairs, write_tokenizer
from small_clip import write_clip

from guided_distill import diagnostics, generate, pipeline, sample, samplers, sharding
from guided_distill.encode import encode
from guided_distill.evaluation.clip_scores import make_scorer
from guided_distill.evaluation.gaussians import frechet_distance, gaussian_stats
from guided_distill.evaluation.reference import load, make_reference, save
from guided_distill.export import command
from guided_distill.interop.command import import_weights
from guided_distill.interop.latent_folder import read_model
from guided_distill.latent_space import LatentSpace

CAPTION = "red"
CAPTIONS = ["red", "blue", "green"]
# Eight pictures, as an evaluation draws: by the same program.
TOLD = {"num_steps": 4, "series": None, "w": 2.0, "labels": None, "num": 8, "seed": 0, "captions": [CAPTION]}
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
             "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip


def write_pipeline(folder, channels=4):
    """A small Stable Diffusion, made and saved by diffusers."""
    unet = {
        "sample_size": 4,
        "in_channels": channels,
        "out_channels": 4,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
    }
    vae = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 8,
    }
    text = {"vocab_size": 54, "max_position_embeddings": 8, "hidden_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 16, "bos_token_id": 52, "eos_token_id": 53}  # fmt: skip
    write_tokenizer(folder / "words")
    kind = diffusers.StableDiffusionInpaintPipeline if channels == 9 else diffusers.StableDiffusionPipeline
    kind(
        unet=shake(diffusers.UNet2DConditionModel(**unet)),
        vae=shake(diffusers.AutoencoderKL(**vae)),
        text_encoder=shake(transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "words"),
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "theirs")
    return folder / "theirs"


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Of the eight that tests have: a program for one compiles faster, and its state is saved faster."""
    make = sharding.make_mesh
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sharding, "make_mesh", lambda devices=None, fsdp=1: make((devices or jax.devices())[:1]))
        yield


def distilled(folder, channels, **updates):
    """(folder, config, summary) of a run on a model of diffusers, as it comes from --mode=import to the evaluation."""
    import_weights(None, str(write_pipeline(folder, channels)), str(folder / "model"))
    config = latent_config(
        folder,
        read_model(folder / "model"),
        **{"data.holdout": 3, "stage1.w_max": 14.0, "stage2.teacher_steps": 8, "checkpoint.every": 100},
        **{"evaluate.w": (4.0,), **updates},
    )
    encode(config, f"folder:{write_pairs(folder / 'pairs')}")
    config["data"]["holdout"] = 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        plain_features.use(monkeypatch)
        monkeypatch.setattr(diagnostics, "looked_at", lambda stages: [])  # it compiles as much again
        return folder, config, pipeline.run(config, folder / "run")


def write_reference(path):
    """Statistics of pictures that no run here has seen, as --mode=reference leaves them."""
    network = plain_features.NETWORK
    features, _ = network.apply(network.params, np.random.default_rng(0).uniform(-1, 1, (40, 8, 8, 3)))
    said = {"network": network.name, "weights_hash": network.weights_hash, "resize": network.resize}
    save(path, make_reference(gaussian_stats(features), features, resolution="8x8x3", source="elsewhere", **said))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is measured as zero-shot figures are taken: on a list of captions, against pictures of elsewhere."""
    folder = tmp_path_factory.mktemp("chain")
    write_clip(folder / "clip")
    write_reference(folder / "reference.npz")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS))
    named = {"clip": "clip", "captions": "captions.txt", "reference": "reference.npz"}
    updates = {f"evaluate.{key}": str(folder / name) for key, name in named.items()}
    return distilled(folder, 4, **{"evaluate.num_steps": (1, 4)}, **updates)


@pytest.fixture(scope="module")
def painting(tmp_path_factory):
    """A run on an inpainting network, of nine channels, cut short: it is told the hole in every stage alike."""
    updates = {"to_v.updates": 0, "stage2.num_steps": (4,), "evaluate.num_steps": (4,)}
    return distilled(tmp_path_factory.mktemp("painting"), 9, **updates)


def exported(run, place):
    """(place, the stock pipeline of the student of four steps there, a caption embedded as the run has it)."""
    folder, config, _ = run
    command.export(config, folder / "run", formats=["diffusers"], stages=None, with_teacher=False, licence=None,
                   out=str(place))  # fmt: skip
    text = pipeline.open_run(config, folder / "run", create=False).conditions_of([CAPTION])["text"]
    found = diffusers.DiffusionPipeline.from_pretrained(place / "diffusers" / "det_0004")
    found.set_progress_bar_config(disable=True)
    return place, found, torch.tensor(text.astype(np.float32))


@pytest.fixture(scope="module")
def stock(finished, tmp_path_factory):
    return exported(finished, tmp_path_factory.mktemp("stock") / "out")


def test_the_model_read_is_the_one_written(finished):
    assert read_model(finished[0] / "model") == MODEL


def test_every_student_is_measured(finished):
    rows = finished[2]["rows"]
    assert {row["num_steps"]: row["nfe"] for row in rows if row["stage"].startswith("stage2")} == {1: 1, 4: 4}


def test_every_row_has_its_clip_score_and_its_distance_to_pictures_of_elsewhere(finished):
    folder, _, summary = finished
    score, network = make_scorer(folder / "clip", CAPTIONS, sharding.make_mesh()), plain_features.NETWORK
    for row in summary["rows"]:
        x = np.load((folder / "run" / row["picture"]).with_suffix(".npy")).astype(np.float32)  # all of them, rounded
        assert len(x) == row["num_samples"] and row["reference"] == "elsewhere"
        label, metrics = np.arange(len(x)) % len(CAPTIONS), row["metrics"]
        assert metrics["clip_score"] == pytest.approx(score(x, label).mean(), abs=0.02)
        assert abs(metrics["clip_score"] - score(x, (label + 1) % len(CAPTIONS)).mean()) > 0.1  # not of another caption
        found = gaussian_stats(network.apply(network.params, x)[0])
        distance = frechet_distance(found, load(folder / "reference.npz").gaussian)
        assert metrics["frechet_efficientnet_lite0"] == pytest.approx(distance, rel=1e-2)


@pytest.fixture
def given(tmp_path):
    """(paths of a picture and of a mask, both of no symmetry; the mask in the two greys around the middle, the two)."""
    rng = np.random.default_rng(3)
    picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    mask = Image.fromarray(rng.choice(np.array([127, 128], np.uint8), (8, 8)))
    paths = {"image": str(tmp_path / "picture.png"), "mask": str(tmp_path / "mask.png")}
    picture.save(paths["image"])
    mask.save(paths["mask"])
    return paths, {"image": picture, "mask_image": mask}


@pytest.mark.parametrize("begin", [("image",), ("image", "mask"), ()])
def test_pictures_come_out(finished, given, tmp_path, begin):
    folder, config, _ = finished
    begin = {name: given[0][name] for name in begin} or {"to_w": 9.0}
    out = tmp_path / "x.npz"
    sample.sample(config, folder / "run", out=str(out), begin=sample.From(**begin), **TOLD)
    x = np.load(out)["x"]
    assert x.shape == (8, 8, 8, 3) and np.ptp(x, axis=0).max() > 1e-3


def test_a_student_runs_in_the_stock_pipeline_of_text(finished, stock):
    folder, config, _ = finished
    place, there, _ = stock
    card = (place / "README.md").read_text()
    assert card.count("| diffusers | det_") == 3 and "no safety checker" in card
    assert type(there) is diffusers.StableDiffusionPipeline
    noise = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    latents = torch.tensor(np.moveaxis(noise, -1, 1).copy())
    image = there(CAPTION, latents=latents, num_inference_steps=4, guidance_scale=3.0, output_type="np").images
    run = pipeline.open_run(config, folder / "run", create=False)
    stage = run.stage("stage2_det_0004")
    cond = {"text": run.space.embed([CAPTION]), "w": np.full(1, 2.0, np.float32)}
    sampler = generate.compiled(stage.model.static(), samplers.deterministic, run.mesh)
    z = sampler(run.params_of(stage), run.grid, None, cond, np.int32(4), noise)
    np.testing.assert_allclose(run.shown(np.asarray(z)) * 0.5 + 0.5, image, atol=1e-4)


def ours(run, tmp_path, **begin):
    """The latent [1, 4, 4, 4] of the first picture that --mode=sample decodes."""
    folder, config, _ = run
    out = str(tmp_path / "z.npz")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(LatentSpace, "decode", lambda self, z: z)
        sample.sample(config, folder / "run", out=out, begin=sample.From(**begin), **TOLD)
    return np.load(out)["x"][:1]


def theirs(stock, kind, **asked):
    """(the latent that a pipeline of this kind ends with, the rows of each call of its network), of the same noise.

    The latent of a picture is its mean, as ours is; theirs is drawn. The caption is in half precision, as a run has it.
    """
    _, loaded, text = stock
    there, calls = kind(**loaded.components, requires_safety_checker=False), []
    there.set_progress_bar_config(disable=True)
    noise = np.asarray(samplers.initial_noise(samplers.image_keys(0, np.arange(1)), (4, 4, 4)))
    noise = torch.tensor(np.moveaxis(noise, -1, 1).copy())
    hook = there.unet.register_forward_hook(lambda module, rows, result: calls.append(len(rows[0])))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys.modules[kind.__module__], "randn_tensor", lambda *args, **options: noise)
        monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        told = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
        latents = there(prompt_embeds=text, **told, **asked).images
    hook.remove()
    return np.moveaxis(latents.numpy(), 1, -1), calls


def close(found, expected):
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert found.shape == expected.shape and error <= 1e-4, error


@pytest.mark.parametrize("start", [1, 3])
def test_a_picture_is_edited_as_in_the_stock_pipeline(finished, stock, given, tmp_path, start):
    """From any t but 1, where ours is of noise alone and that pipeline leaves some of the picture in it."""
    paths, pictures = given
    kind, asked = diffusers.StableDiffusionImg2ImgPipeline, {"image": pictures["image"], "strength": start / 4}
    expected, calls = theirs(stock, kind, **asked)
    assert calls == [1] * start
    close(ours(finished, tmp_path, image=paths["image"], start=start), expected)


@pytest.mark.parametrize("start", [2, 4])
def test_a_plain_network_paints_in_as_in_the_stock_pipeline(finished, stock, given, tmp_path, start):
    paths, pictures = given
    expected, calls = theirs(stock, diffusers.StableDiffusionInpaintPipeline, strength=start / 4, **pictures)
    assert calls == [1] * start
    close(ours(finished, tmp_path, start=start, **paths), expected)


def test_the_inpainting_network_is_distilled(painting):
    folder, config, summary = painting
    assert read_model(folder / "model") == PAINTS_IN
    run = pipeline.open_run(config, folder / "run", create=False)
    kernels = [run.params_of(run.stage(name))["conv_in"]["kernel"] for name in ("teacher", "stage1", "stage2_det_0004")]
    for before, after in itertools.pairwise(np.asarray(kernel) for kernel in kernels):
        # Of the latent, the mask and the latent around the hole, each taught the network something.
        assert (np.abs(after - before).max((0, 1, 3)) > 0.0).all()
    assert {row["num_steps"]: row["nfe"] for row in summary["rows"] if row["stage"].startswith("stage2")} == {4: 4}


def test_the_inpainting_network_paints_in_as_in_the_stock_pipeline(painting, given, tmp_path):
    paths, pictures = given
    stock = exported(painting, tmp_path / "out")
    kind = diffusers.StableDiffusionInpaintPipeline
    assert type(stock[1]) is kind
    expected, calls = theirs(stock, kind, strength=1.0, **pictures)
    assert calls == [1] * 4
    found = ours(painting, tmp_path, **paths)
    close(found, expected)
    Image.new("L", (8, 8), 255).save(paths["mask"])
    assert np.abs(ours(painting, tmp_path, **paths) - found).max() > 1e-3  # it sees where the hole is


def test_a_mask_of_any_colour_is_the_hole_that_stock_pipelines_take_it_for(tmp_path):
    rng = np.random.default_rng(0)
    Image.new("RGB", (16, 16)).save(tmp_path / "picture.png")
    processor = diffusers.image_processor.VaeImageProcessor(
        vae_scale_factor=2, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    for values in (np.arange(256, dtype=np.uint8).reshape(16, 16), rng.integers(0, 256, (16, 16, 3), np.uint8)):
        mask = Image.fromarray(values)
        mask.save(tmp_path / "mask.png")
        begin = sample.From(image=str(tmp_path / "picture.png"), mask=str(tmp_path / "mask.png"))
        _, hole = sample._picture_and_hole(begin, (16, 16, 3))
        np.testing.assert_array_equal(hole[..., 0], processor.preprocess(mask)[0, 0].numpy())
