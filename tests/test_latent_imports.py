"""Weights of others: every key has one place, trees come back bit for bit, each thing wrong with a file gets a line."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
from flax.traverse_util import flatten_dict

from guided_distill.errors import UserError
from guided_distill.interop import compvis, diffusers_configs, diffusers_folder, diffusers_names
from guided_distill.interop.tensors import Names, export_tree, import_tree
from guided_distill.interop.weight_files import read_weights
from guided_distill.models.autoencoder import AutoencoderConfig
from guided_distill.models.clip import TextConfig
from guided_distill.models.latent_models import LATENT_MODELS, LatentModel, part_shapes
from guided_distill.models.sd_unet import SDUNetConfig

UNET = SDUNetConfig(
    channels=4, multipliers=(1, 2, 2), attention=(True, True, False), heads=(2, 2, 2), context_dim=6, norm_groups=2
)
TEXT = TextConfig(vocabulary=9, positions=5, width=6, layers=2, heads=2, mlp=7)
FIRST = AutoencoderConfig(channels=4, multipliers=(1, 2, 2), norm_groups=2)
MODELS = {
    "sd1": LatentModel(UNET, FIRST, TEXT),
    "student": LatentModel(dataclasses.replace(UNET, w_conditioned=True, w_channels=8), FIRST, TEXT, "v"),
    "sd2": LatentModel(
        dataclasses.replace(UNET, linear_projection=True, heads=(1, 2, 2)),
        FIRST,
        dataclasses.replace(TEXT, activation="gelu"),
        "v",
        96,
    ),
    "inpainting": LatentModel(dataclasses.replace(UNET, extra_channels=5), FIRST, TEXT),
    "ldm": LatentModel(
        dataclasses.replace(UNET, attention=(False, True, True), num_classes=3, out_channels=3),
        dataclasses.replace(FIRST, latent_channels=3, num_codes=5, scale=1.0),
        None,
    ),
}


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return rng.normal(size=leaf.shape).astype(np.float32)

    return {part: jax.tree.map(draw, part_shapes(getattr(model, part))) for part in model.parts}


def equal(a, b):
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    assert a.keys() == b.keys()
    for path, value in a.items():
        assert b[path].dtype == np.float32
        np.testing.assert_array_equal(b[path], value, err_msg=path)


def refused(match, call, *arguments):
    with pytest.raises(UserError, match=match) as error:
        call(*arguments)
    assert "\n" not in str(error.value)


# Trees and names


def test_tensors_are_transposed_and_nothing_else():
    names = Names({"a": "x.conv", "b": "x.linear", "c": "x.point", "d": "y", "e": "z"}, frozenset(["c"]))
    rng = np.random.default_rng(0)
    params = {
        "a": {"kernel": rng.normal(size=(3, 3, 2, 5)).astype(np.float32), "bias": np.ones(5, np.float32)},
        "b": {"kernel": rng.normal(size=(2, 4)).astype(np.float32)},
        "c": {"kernel": rng.normal(size=(2, 4)).astype(np.float32)},
        "d": {"embedding": rng.normal(size=(7, 2)).astype(np.float32)},
        "e": rng.normal(size=(4, 2)).astype(np.float32),
    }
    state = export_tree(names, params)
    shapes = {"x.conv.weight": (5, 2, 3, 3), "x.conv.bias": (5,), "x.linear.weight": (4, 2)}
    shapes |= {"x.point.weight": (4, 2, 1, 1), "y.weight": (7, 2), "z": (4, 2)}
    assert {key: value.shape for key, value in state.items()} == shapes == names.their_shapes(params)
    assert state["x.conv.weight"][4, 1, 0, 2] == params["a"]["kernel"][0, 2, 1, 4]
    equal(params, import_tree(names, params, state, "it"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format_", [diffusers_folder.PARTS, compvis.PARTS], ids=["diffusers", "compvis"])
def test_every_parameter_has_a_key_of_its_own(name, format_):
    model = MODELS[name]
    for part in model.parts:
        names = format_[part][-1] if isinstance(format_[part], tuple) else format_[part]
        config = dataclasses.replace(getattr(model, part))
        if part == "unet":  # diffusers has no table of classes, CompVis no w
            config = dataclasses.replace(config, num_classes=0, w_conditioned=False)
        shapes = part_shapes(config)
        assert len(names(config).their_shapes(shapes)) == len(flatten_dict(shapes))


@pytest.mark.parametrize("name", LATENT_MODELS)
def test_compvis_names_cover_the_published_models_at_full_size(name):
    model, keys = LATENT_MODELS[name], []
    for part in model.parts:
        keys += compvis.PARTS[part](getattr(model, part)).their_shapes(part_shapes(getattr(model, part)))
    assert len(keys) == len({*keys})
    unet, first = "model.diffusion_model", "first_stage_model"
    known = ["output_blocks.8.0.in_layers.2.weight", "output_blocks.5.2.conv.weight", "input_blocks.3.0.op.bias"]
    known.append(f"output_blocks.2.{2 if model.unet.attention[-1] else 1}.conv.weight")  # behind attention, if any
    assert {f"{first}.decoder.mid.attn_1.q.bias", *(f"{unet}.{key}" for key in known)} <= {*keys}


def test_keys_of_stable_diffusion_in_diffusers_as_published():
    """A few whose place in the network and whose shape tell the order of levels and blocks."""
    model, found = LATENT_MODELS["sd1"], {}
    for part in model.parts:
        config = getattr(model, part)
        found |= diffusers_folder.PARTS[part][-1](config).their_shapes(part_shapes(config))
    published = {
        "up_blocks.0.resnets.0.conv1.weight": (1280, 2560, 3, 3),
        "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "up_blocks.2.upsamplers.0.conv.weight": (640, 640, 3, 3),
        "down_blocks.1.attentions.0.proj_in.weight": (640, 640, 1, 1),
        "down_blocks.2.resnets.0.conv_shortcut.weight": (1280, 640, 1, 1),
        "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": (128, 256, 1, 1),
        "encoder.conv_out.weight": (8, 512, 3, 3),
        "text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    }
    assert {key: found.get(key) for key in published} == published


_SD_UNET = {
    "act_fn": "silu", "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-5,
    "norm_num_groups": 32, "out_channels": 4, "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}  # fmt: skip
_SD1_UNET = _SD_UNET | {"attention_head_dim": 8, "cross_attention_dim": 768, "in_channels": 4}
_SD2_UNET = _SD_UNET | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "in_channels": 4,
                        "use_linear_projection": True, "dual_cross_attention": False, "num_class_embeds": None,
                        "only_cross_attention": False}  # fmt: skip
_SD_TEXT = {"architectures": ["CLIPTextModel"], "layer_norm_eps": 1e-5, "max_position_embeddings": 77,
            "vocab_size": 49408}  # fmt: skip
_SD1_TEXT = _SD_TEXT | {"hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072,
                        "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768}  # fmt: skip
_SD2_TEXT = _SD_TEXT | {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
                        "num_attention_heads": 16, "num_hidden_layers": 23, "projection_dim": 512}  # fmt: skip
_SD_VAE = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "norm_num_groups": 32, "out_channels": 3, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
             "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "trained_betas": None}  # fmt: skip
# What the configs of the published folders say, and no more: most are older than half of the keys there are today.
PUBLISHED = {
    "sd1": (_SD1_UNET | {"sample_size": 64}, _SD1_TEXT, _SD_BETAS),
    "sd1_inpainting": (_SD1_UNET | {"sample_size": 64, "in_channels": 9}, _SD1_TEXT, _SD_BETAS),
    "sd2_base": (_SD2_UNET | {"sample_size": 64}, _SD2_TEXT, _SD_BETAS | {"prediction_type": "epsilon"}),
    "sd2_768": (_SD2_UNET | {"sample_size": 96, "upcast_attention": True}, _SD2_TEXT,
                _SD_BETAS | {"prediction_type": "v_prediction"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configs_are_those_of_the_published_models(name):
    unet, text, scheduler = PUBLISHED[name]
    assert LATENT_MODELS[name] == LatentModel(
        diffusers_configs.read_unet(unet, scheduler, name),
        diffusers_configs.read_autoencoder(_SD_VAE, name),
        diffusers_configs.read_text_encoder(text, name),
        diffusers_configs.read_parameterisation(scheduler, name),
        unet["sample_size"],
    )


# Folders of diffusers


@pytest.mark.parametrize("name", ["sd1", "student", "sd2", "inpainting"])
def test_a_folder_comes_back_bit_for_bit(name, tmp_path):
    model, params = MODELS[name], random_params(MODELS[name])
    diffusers_folder.write_diffusers(tmp_path / "a", model, params)
    again, theirs = diffusers_folder.read_diffusers(tmp_path / "a")
    assert again == model
    for part in model.parts:
        equal(params[part], theirs[part])
    diffusers_folder.write_diffusers(tmp_path / "b", again, theirs)
    for path in (tmp_path / "a").rglob("*.*"):
        assert (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes() == path.read_bytes(), path


def rewrite(path, change):
    state = safetensors.numpy.load_file(path)
    change(state)
    safetensors.numpy.save_file(state, path)


@pytest.fixture
def folder(tmp_path):
    diffusers_folder.write_diffusers(tmp_path / "sd", MODELS["sd1"], random_params(MODELS["sd1"]))
    return tmp_path / "sd"


def test_folders_of_older_libraries_are_the_same_model(folder):
    _, expected = diffusers_folder.read_diffusers(folder)

    def age(state):
        for key in [key for key in state if ".mid_block.attentions" in key]:
            old = key
            for before, now in diffusers_names.OLD_SELF_ATTENTION.items():
                old = old.replace(now, before)
            value = state.pop(key)
            state[old] = value[:, :, None, None] if value.ndim == 2 else value

    rewrite(folder / "vae/diffusion_pytorch_model.safetensors", age)
    position_ids = {"text_model.embeddings.position_ids": np.arange(5)[None]}
    rewrite(folder / "text_encoder/model.safetensors", lambda state: state.update(position_ids))
    for part, params in diffusers_folder.read_diffusers(folder)[1].items():
        equal(expected[part], params)


def test_weights_without_the_prefix_or_in_shards_are_the_same(folder):
    _, expected = diffusers_folder.read_diffusers(folder)
    path = folder / "text_encoder/model.safetensors"
    state = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({key.removeprefix("text_model."): value for key, value in state.items()}, path)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    state, weight_map = safetensors.numpy.load_file(path), {}
    for number, keys in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-00002.safetensors"
        safetensors.numpy.save_file({key: state[key] for key in keys}, folder / "unet" / name)
        weight_map |= {key: name for key in keys}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    path.unlink()
    for part, params in diffusers_folder.read_diffusers(folder)[1].items():
        equal(expected[part], params)


def test_a_file_of_a_unet_alone_stands_for_that_of_a_folder(folder, tmp_path):
    """As those that are published by themselves do: what it says of w goes before what the folder says."""
    student = dataclasses.replace(MODELS["student"], parameterisation="eps")
    params, path = random_params(student, seed=1), tmp_path / "distilled.safetensors"
    state = export_tree(diffusers_names.unet(student.unet), params["unet"])
    safetensors.numpy.save_file(state, path)
    plain = random_params(MODELS["sd1"])
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    model, read = diffusers_folder.read_diffusers(folder, path)
    assert model == student and model.unet.w_channels == 8
    for part, expected in (plain | {"unet": params["unet"]}).items():
        equal(expected, read[part])
    for change, says in (
        (lambda state: state.update(extra=np.ones(1)), "distilled.safetensors does not fit.*left over: extra"),
        (lambda state: state.pop("conv_in.bias"), "missing: conv_in.bias"),
        (lambda state: state.update({"time_embedding.cond_proj.weight": np.ones((5, 8))}), r"cond_proj.* \(5, 8\)"),
    ):
        safetensors.numpy.save_file(state, path)
        rewrite(path, change)
        refused(says, diffusers_folder.read_diffusers, folder, path)
    refused("nowhere.pt: no such file", diffusers_folder.read_diffusers, folder, tmp_path / "nowhere.pt")
    diffusers_folder.write_diffusers(tmp_path / "student", student, params)
    safetensors.numpy.save_file(export_tree(diffusers_names.unet(UNET), plain["unet"]), path)
    assert not diffusers_folder.read_diffusers(tmp_path / "student", path)[0].unet.w_conditioned


def test_what_is_wrong_with_a_folder_is_named(folder):
    read, unet = diffusers_folder.read_diffusers, folder / "unet/diffusion_pytorch_model.safetensors"
    whole = unet.read_bytes()
    rewrite(unet, lambda state: state.update(extra=np.ones(1), **{"conv_in.bias": np.ones(5)}))
    refused(r"of another shape: conv_in.bias \(5,\), not \(4,\)", read, folder)
    refused("left over: extra", read, folder)
    unet.write_bytes(whole)
    rewrite(unet, lambda state: [state.pop(key) for key in list(state) if key.startswith("mid_block")])
    refused("unet does not fit.*missing: mid_block.attentions.0.norm.bias, .* and 43 more", read, folder)
    unet.write_bytes(whole[:-100])
    refused("no whole safetensors file", read, folder)
    unet.unlink()
    refused("diffusion_pytorch_model.safetensors is missing", read, folder)


@pytest.mark.parametrize(
    "file, changes, match",
    [
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ("unet", {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type"),
        ("unet", {"up_block_types": ["UpBlock2D"] * 3}, "no U-Net of Stable Diffusion"),
        ("unet", {"block_out_channels": [4, 6, 8]}, "not multiples of the first"),
        ("unet", {"cross_attention_dim": 8}, "6 wide, the U-Net attends to 8"),
        ("vae", {"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("scheduler", {"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
        ("scheduler", {"trained_betas": [0.1]}, "trained_betas is .0.1."),
        ("scheduler", {"prediction_type": "flow"}, "prediction_type is 'flow'"),
    ],
)
def test_a_config_of_another_architecture_is_refused_by_its_key(folder, file, changes, match):
    path = folder / file / ("scheduler_config.json" if file == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(match, diffusers_folder.read_diffusers, folder)


def test_what_diffusers_has_no_place_for_is_refused(tmp_path):
    refused("no pipeline for this model", diffusers_folder.write_diffusers, tmp_path, MODELS["ldm"], {})
    refused("takes a label", diffusers_configs.write_unet, MODELS["ldm"].unet, 64)
    refused("config.json is missing", diffusers_folder.read_diffusers, tmp_path)


# Single files


@pytest.fixture
def kinds(monkeypatch):
    for name, model in MODELS.items():
        monkeypatch.setitem(LATENT_MODELS, name, model)


@pytest.mark.parametrize("name", ["sd1", "sd2", "inpainting", "ldm"])
def test_a_single_file_comes_back_bit_for_bit(kinds, name, tmp_path):
    params = random_params(MODELS[name])
    compvis.write_compvis(tmp_path / "a.safetensors", MODELS[name], params)
    model, again = compvis.read_compvis(tmp_path / "a.safetensors", name)
    assert model == MODELS[name]
    for part in model.parts:
        equal(params[part], again[part])
    compvis.write_compvis(tmp_path / "b.safetensors", model, again)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_what_single_files_hold_besides_is_left_and_their_average_is_taken(kinds, tmp_path):
    path, model = tmp_path / "a.safetensors", MODELS["sd2"]
    params, averages = random_params(model), random_params(model, seed=1)
    state = export_tree(compvis.PARTS["unet"](model.unet), averages["unet"])
    dotless = {"model_ema." + key.removeprefix("model.").replace(".", ""): value for key, value in state.items()}
    compvis.write_compvis(path, model, params)
    besides = ["betas", "sqrt_alphas_cumprod", "first_stage_model.loss.logvar", "cond_stage_model.model.logit_scale"]
    besides += ["model_ema.num_updates", "cond_stage_model.model.transformer.resblocks.2.ln_1.weight"]
    rewrite(path, lambda state: state.update(dotless | {key: np.ones(1) for key in besides}))
    _, again = compvis.read_compvis(path, "sd2")
    equal(averages["unet"], again["unet"])
    equal(params["text_encoder"], again["text_encoder"])
    rewrite(path, lambda state: state.pop(sorted(dotless)[3]))
    refused("the moving average lacks", compvis.read_compvis, path, "sd2")


def test_what_is_wrong_with_a_single_file_is_named(kinds, tmp_path):
    path = tmp_path / "a.safetensors"
    refused("'sd7' is no kind of latent model", compvis.read_compvis, path, "sd7")
    refused("no such file", compvis.read_compvis, path, "sd1")
    compvis.write_compvis(path, MODELS["sd1"], random_params(MODELS["sd1"]))
    refused("read as inpainting, does not fit.*input_blocks.0.0.weight", compvis.read_compvis, path, "inpainting")
    rewrite(path, lambda state: state.update(stranger=np.ones(1)))
    refused("left over are stranger", compvis.read_compvis, path, "sd1")
    refused("no place for the w input", compvis.write_compvis, path, MODELS["student"], {})


def test_half_precision_is_read_as_the_same_numbers(tmp_path):
    values = np.array([1.5, -0.0078125, 3e4], np.float32)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        safetensors.flax.save_file({"a": jax.numpy.asarray(values.astype(dtype))}, tmp_path / "a.safetensors")
        read = read_weights(tmp_path / "a.safetensors")["a"]
        np.testing.assert_array_equal(np.asarray(read, np.float32), values.astype(dtype).astype(np.float32))
