"""The names that diffusers and transformers have for the layers of our latent networks."""

from guided_distill.interop.tensors import Names

UNET_ENDS = {
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
    "embedding/time1": "time_embedding.linear_1",
    "embedding/time2": "time_embedding.linear_2",
    "embedding/w": "time_embedding.cond_proj",
}
RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "emb": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
TRANSFORMER = {
    "norm": "norm",
    "project_in": "proj_in",
    "project_out": "proj_out",
    **{f"block/norm{i}": f"transformer_blocks.0.norm{i}" for i in (1, 2, 3)},
    **{
        f"block/{ours}_attention/{a}": f"transformer_blocks.0.{theirs}.{b}"
        for ours, theirs in (("self", "attn1"), ("cross", "attn2"))
        for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0"))
    },
    "block/mlp1": "transformer_blocks.0.ff.net.0.proj",
    "block/mlp2": "transformer_blocks.0.ff.net.2",
}
AUTOENCODER_ENDS = {
    "conv_to_latent": "quant_conv",
    "conv_from_latent": "post_quant_conv",
    "codebook": "quantize.embedding",
}
HALF_ENDS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
SELF_ATTENTION = {
    "norm": "group_norm",
    "attention/q": "to_q",
    "attention/k": "to_k",
    "attention/v": "to_v",
    "attention/out": "to_out.0",
}
# Names of the autoencoder's attention in folders written before 2023, which are most of the published ones.
OLD_SELF_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
CLIP_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp1": "mlp.fc1",
    "mlp2": "mlp.fc2",
    **{f"attention/{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")},
}
TEXT_ENDS = {
    "tokens": "text_model.embeddings.token_embedding",
    "positions": "text_model.embeddings.position_embedding.weight",
    "norm_out": "text_model.final_layer_norm",
    "project": "text_projection",
}
VISION_ENDS = {
    "patches": "vision_model.embeddings.patch_embedding",
    "positions": "vision_model.embeddings.position_embedding.weight",
    "first_token": "vision_model.embeddings.class_embedding",
    "norm_in": "vision_model.pre_layrnorm",
    "norm_out": "vision_model.post_layernorm",
    "project": "visual_projection",
}


def within(ours, theirs, table):
    """The names of a block that is called `ours` here and `theirs` there."""
    return {f"{ours}/{a}": f"{theirs}.{b}" for a, b in table.items()}


def unet(config):
    """Names of UNet2DConditionModel. The table of classes has none there."""
    levels, layers = len(config.multipliers), dict(UNET_ENDS)
    for level in range(levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        layers |= {f"down_{level}_resample/conv": f"{down}.downsamplers.0.conv"}
        layers |= {f"up_{level}_resample/conv": f"{up}.upsamplers.0.conv"}
        for i in range(config.num_blocks + 1):
            for ours, theirs in ((f"down_{level}_{i}", down), (f"up_{level}_{i}", up)):
                layers |= within(ours, f"{theirs}.resnets.{i}", RESNET)
                layers |= within(f"{ours}_attention", f"{theirs}.attentions.{i}", TRANSFORMER)
    layers |= within("mid_0", "mid_block.resnets.0", RESNET) | within("mid_1", "mid_block.resnets.1", RESNET)
    return Names(layers | within("mid_attention", "mid_block.attentions.0", TRANSFORMER))


def autoencoder(config):
    """Names of AutoencoderKL, and of VQModel where there is a codebook."""
    levels, layers = len(config.multipliers), dict(AUTOENCODER_ENDS)
    for half in ("encoder", "decoder"):
        layers |= within(half, half, HALF_ENDS)
        for i in (0, 1):
            layers |= within(f"{half}/mid_{i}", f"{half}.mid_block.resnets.{i}", RESNET)
        layers |= within(f"{half}/mid_attention", f"{half}.mid_block.attentions.0", SELF_ATTENTION)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        layers |= {f"encoder/down_{level}_resample/conv": f"{down}.downsamplers.0.conv"}
        layers |= {f"decoder/up_{level}_resample/conv": f"{up}.upsamplers.0.conv"}
        for i in range(config.num_blocks + 1):
            layers |= within(f"encoder/down_{level}_{i}", f"{down}.resnets.{i}", RESNET)
            layers |= within(f"decoder/up_{level}_{i}", f"{up}.resnets.{i}", RESNET)
    return Names(layers)


def text_encoder(config):
    """Names of CLIPTextModel, and of CLIPTextModelWithProjection where there is a projection."""
    return Names(TEXT_ENDS | _clip_layers("text_model", config.layers))


def vision_encoder(config):
    """Names of CLIPVisionModelWithProjection."""
    return Names(VISION_ENDS | _clip_layers("vision_model", config.layers))


def _clip_layers(model, count):
    layers = {}
    for i in range(count):
        layers |= within(f"layer_{i}", f"{model}.encoder.layers.{i}", CLIP_LAYER)
    return layers
