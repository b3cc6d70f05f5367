"""The names of our latent networks' layers in the single-file checkpoints of CompVis and Stability AI."""

from guided_distill.interop.diffusers_names import TRANSFORMER, within
from guided_distill.interop.diffusers_names import text_encoder as transformers_text_encoder
from guided_distill.interop.tensors import Names

UNET, FIRST, TEXT = "model.diffusion_model", "first_stage_model", "cond_stage_model"
UNET_ENDS = {
    "conv_in": f"{UNET}.input_blocks.0.0",
    "norm_out": f"{UNET}.out.0",
    "conv_out": f"{UNET}.out.2",
    "embedding/time1": f"{UNET}.time_embed.0",
    "embedding/time2": f"{UNET}.time_embed.2",
    "classes": f"{TEXT}.embedding",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "emb": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
AUTOENCODER_ENDS = {
    "conv_to_latent": f"{FIRST}.quant_conv",
    "conv_from_latent": f"{FIRST}.post_quant_conv",
    "codebook": f"{FIRST}.quantize.embedding",
}
HALF_ENDS = {"conv_in": "conv_in", "norm_out": "norm_out", "conv_out": "conv_out"}
FIRST_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "nin_shortcut"}
SELF_ATTENTION = {
    "norm": "norm",
    "attention/q": "q",
    "attention/k": "k",
    "attention/v": "v",
    "attention/out": "proj_out",
}
OPEN_CLIP_ENDS = {
    "tokens": f"{TEXT}.model.token_embedding",
    "positions": f"{TEXT}.model.positional_embedding",
    "norm_out": f"{TEXT}.model.ln_final",
}
OPEN_CLIP_LAYER = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "mlp1": "mlp.c_fc",
    "mlp2": "mlp.c_proj",
    # q, k and v are one matrix in the file; `compvis` takes it apart under these names.
    **{f"attention/{name}": f"attn.{name}" for name in ("q", "k", "v")},
    "attention/out": "attn.out_proj",
}


def unet(config):
    """Names of the U-Net, and of the table of classes where it takes a label; w has no place in such files."""
    levels, per_level, layers = len(config.multipliers), config.num_blocks + 1, dict(UNET_ENDS)
    for level in range(levels):
        # Blocks are counted through, with conv_in and each change of the side among them.
        down, up = 1 + level * per_level, (levels - 1 - level) * per_level
        for i in range(config.num_blocks):
            layers |= _block(f"down_{level}_{i}", f"{UNET}.input_blocks.{down + i}")
        layers[f"down_{level}_resample/conv"] = f"{UNET}.input_blocks.{down + config.num_blocks}.0.op"
        for i in range(per_level):
            layers |= _block(f"up_{level}_{i}", f"{UNET}.output_blocks.{up + i}")
        place = 2 if config.attention[level] else 1
        layers[f"up_{level}_resample/conv"] = f"{UNET}.output_blocks.{up + config.num_blocks}.{place}.conv"
    for i in (0, 1):
        layers |= within(f"mid_{i}", f"{UNET}.middle_block.{2 * i}", RESNET)
    return Names(layers | within("mid_attention", f"{UNET}.middle_block.1", TRANSFORMER))


def _block(ours, theirs):
    return within(ours, f"{theirs}.0", RESNET) | within(f"{ours}_attention", f"{theirs}.1", TRANSFORMER)


def autoencoder(config):
    """Names of the first stage, of which attention is made of 1x1 convolutions."""
    layers = dict(AUTOENCODER_ENDS)
    for half in ("encoder", "decoder"):
        layers |= within(half, f"{FIRST}.{half}", HALF_ENDS)
        for i in (0, 1):
            layers |= within(f"{half}/mid_{i}", f"{FIRST}.{half}.mid.block_{i + 1}", FIRST_RESNET)
        layers |= within(f"{half}/mid_attention", f"{FIRST}.{half}.mid.attn_1", SELF_ATTENTION)
    for level in range(len(config.multipliers)):
        down, up = f"{FIRST}.encoder.down.{level}", f"{FIRST}.decoder.up.{level}"
        layers |= {f"encoder/down_{level}_resample/conv": f"{down}.downsample.conv"}
        layers |= {f"decoder/up_{level}_resample/conv": f"{up}.upsample.conv"}
        for i in range(config.num_blocks + 1):
            layers |= within(f"encoder/down_{level}_{i}", f"{down}.block.{i}", FIRST_RESNET)
            layers |= within(f"decoder/up_{level}_{i}", f"{up}.block.{i}", FIRST_RESNET)
    pointwise = (f"{half}/mid_attention/attention/{name}" for half in ("encoder", "decoder") for name in "qkv")
    return Names(layers, frozenset([*pointwise, *(f"{h}/mid_attention/attention/out" for h in ("encoder", "decoder"))]))


def text_encoder(config):
    """Names of the text encoder: transformers' for CLIP (quick_gelu), OpenCLIP's for its own (gelu)."""
    if config.activation == "quick_gelu":
        theirs = transformers_text_encoder(config).layers
        return Names({ours: f"{TEXT}.transformer.{name}" for ours, name in theirs.items()})
    layers = dict(OPEN_CLIP_ENDS)
    for i in range(config.layers):
        layers |= within(f"layer_{i}", f"{TEXT}.model.transformer.resblocks.{i}", OPEN_CLIP_LAYER)
    return Names(layers)
