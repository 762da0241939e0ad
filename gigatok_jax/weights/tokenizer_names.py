"""Table of the names of a tokenizer's parameters, ours and PyTorch's, in PyTorch's order."""

import ml_collections

from gigatok_jax.model_config import SIZES
from gigatok_jax.models.cnn import channels
from gigatok_jax.weights.names import Entry, layer_pair, norm_pair, under

HISTORY = 65536  # number of latest codes that the original keeps
_QKV = ("query", "key", "value")
_FUSED = [
    *(Entry(f"{name}/kernel", "in_proj_weight", "dense", i) for i, name in enumerate(_QKV)),
    *(Entry(f"{name}/bias", "in_proj_bias", "same", i) for i, name in enumerate(_QKV)),
    *layer_pair("out", "out_proj", "dense"),
]
_QK_NORM = [
    *layer_pair("query", "q_proj", "dense"),
    *layer_pair("key", "k_proj", "dense"),
    *layer_pair("value", "v_proj", "dense"),
    *layer_pair("out", "wo", "dense"),
    *norm_pair("query_norm", "q_norm"),
    *norm_pair("key_norm", "k_norm"),
]
_MLP = [*layer_pair("mlp/up", "linear1", "dense"), *layer_pair("mlp/down", "linear2", "dense")]
_CNN_ATTENTION = [
    *norm_pair("norm", "norm"),
    *layer_pair("query", "q", "conv1x1"),
    *layer_pair("key", "k", "conv1x1"),
    *layer_pair("value", "v", "conv1x1"),
    *layer_pair("out", "proj_out", "conv1x1"),
]
_ALIGN = [
    *layer_pair("dense_0", "0", "dense"),
    *layer_pair("dense_1", "2", "dense"),
    *layer_pair("dense_2", "4", "dense"),
]


def entries(model: ml_collections.ConfigDict) -> list[Entry]:
    """Lists our path and the original's name of every parameter and buffer of a tokenizer."""
    one_d = model.kind == "1d"
    encoder, decoder = (
        ("s2to1encoder.", "s1to2decoder.") if one_d else ("s2dencoder.", "s2ddecoder.")
    )
    return [
        *under(_cnn_encoder(model), "cnn_encoder/", "encoder."),
        *under(_encoder(model), "encoder/", encoder),
        *under(_decoder(model), "decoder/", decoder),
        *under(_cnn_decoder(model), "cnn_decoder/", "decoder."),
        Entry("buffers/codebook_used", "quantize.codebook_used"),
        Entry("quantizer/codebook", "quantize.embedding.weight"),
        *layer_pair("pre_quant", "quant_conv", "conv1x1"),
        *layer_pair("post_quant", "post_quant_conv", "conv1x1"),
    ]


def _attention(model, path: str, name: str) -> list[Entry]:
    return under(_QK_NORM if model.qk_norm else _FUSED, f"{path}/", f"{name}.")


def _block(model) -> list[Entry]:
    qformer = model.kind == "1d" or model.layer_2d == "qformer"
    cross = _attention(model, "cross_attention", "multihead_attn") if qformer else []
    norms = ("norm1", "norm2", "norm3") if qformer else ("norm1", "norm2")
    return [
        *_attention(model, "self_attention", "self_attn"),
        *cross,
        *_MLP,
        *(entry for norm in norms for entry in norm_pair(norm, norm)),
    ]


def _stack(model, path: str, first: int, count: int) -> list[Entry]:
    block = _block(model)
    return [
        entry
        for i in range(count)
        for entry in under(block, f"{path}/", f"transformer.{first + i}.", layer=i)
    ]


def _encoder(model) -> list[Entry]:
    entries = [Entry("positions", "positional_embedding", "sequence")]
    if model.kind == "1d":
        entries += [Entry("query_positions", "latent_token_positional_embedding", "sequence")]
        if model.query_init == "learnable":
            entries += [Entry("queries", "query_1d", "sequence")]
    entries += [*layer_pair("embed", "encoder_embed", "dense"), *norm_pair("norm_in", "ln_pre")]
    if model.kind == "1d" and model.query_init != "learnable":
        entries += layer_pair("query_proj", "global_proj", "dense")
    return [
        *entries,
        *_stack(model, "blocks", 0, SIZES[model.encoder][0]),
        *norm_pair("norm_out", "ln_post"),
        *layer_pair("proj_out", "conv_out", "conv1x1"),
    ]


def _decoder(model) -> list[Entry]:
    learnable = model.kind == "1d" and model.decoder_query_init == "learnable"
    entries = [Entry("queries", "q_2d", "sequence")] if learnable else []
    entries += [Entry("positions", "positional_embedding", "sequence")]
    if model.kind == "1d":
        entries += [Entry("latent_positions", "latent_token_positional_embedding", "sequence")]
    tap, layers = model.align_block, SIZES[model.decoder][0]
    return [
        *entries,
        *layer_pair("embed", "decoder_embed", "dense"),
        *norm_pair("norm_in", "ln_pre"),
        *_stack(model, "blocks_to_tap", 0, tap),
        *_stack(model, "blocks", tap, layers - tap),
        *norm_pair("norm_out", "ln_post"),
        *layer_pair("conv_out", "conv_out", "conv"),
        *(under(_ALIGN, "align/", "distill_mlp.") if tap else []),
    ]


def _resnet(path: str, name: str, shortcut: bool) -> list[Entry]:
    block = [
        *norm_pair("norm1", "norm1"),
        *layer_pair("conv1", "conv1", "conv"),
        *norm_pair("norm2", "norm2"),
        *layer_pair("conv2", "conv2", "conv"),
        *(layer_pair("shortcut", "nin_shortcut", "conv") if shortcut else []),
    ]
    return under(block, f"{path}/", f"{name}.")


def _middle(model) -> list[Entry]:
    attention = under(_CNN_ATTENTION, "mid_attention/", "mid.1.") if model.cnn_attention else []
    last = 2 if model.cnn_attention else 1
    return [
        *_resnet("mid_block_0", "mid.0", False),
        *attention,
        *_resnet("mid_block_1", f"mid.{last}", False),
    ]


def _level(model, i: int, blocks: int, before: int, after: int, attention: bool) -> list[Entry]:
    """Lists the entries of a CNN's residual blocks of one resolution, and of their attention.

    The first block has a shortcut layer if the width changes.
    """
    entries = []
    for j in range(blocks):
        changes = j == 0 and before != after
        entries += _resnet(f"level_{i}_block_{j}", f"conv_blocks.{i}.res.{j}", changes)
    for j in range(blocks if attention and model.cnn_attention else 0):
        path, name = f"level_{i}_attention_{j}/", f"conv_blocks.{i}.attn.{j}."
        entries += under(_CNN_ATTENTION, path, name)
    return entries


def _cnn_encoder(model) -> list[Entry]:
    if model.stem == "patch":  # small models of ours; the original has none
        return layer_pair("embed", "embed", "dense")
    widths = channels(model.cnn_channels, model.patch_size)
    last = len(widths) - 1
    entries = layer_pair("conv_in", "conv_in", "conv")
    for i, width in enumerate(widths):
        entries += _level(model, i, 2, widths[max(i - 1, 0)], width, i == last)
        if i != last:
            entries += layer_pair(f"level_{i}_down", f"conv_blocks.{i}.downsample.conv", "conv")
    return [*entries, *_middle(model), *_cnn_out()]


def _cnn_decoder(model) -> list[Entry]:
    if model.stem == "patch":
        return [*norm_pair("norm_out", "norm_out"), *layer_pair("out", "out", "dense")]
    widths = channels(model.cnn_channels, model.patch_size)[::-1]
    entries = [*layer_pair("conv_in", "conv_in", "conv"), *_middle(model)]
    up = "upsample.conv1" if model.depth_to_space else "upsample.conv"
    for i, width in enumerate(widths):
        entries += _level(model, i, 3, widths[max(i - 1, 0)], width, i == 0)
        if i != len(widths) - 1:
            entries += layer_pair(f"level_{i}_up", f"conv_blocks.{i}.{up}", "conv")
    for i in range(len(widths) if model.adaptive_group_norm else 0):
        entries += layer_pair(f"level_{i}_adaptive/scale", f"adaptive.{i}.gamma", "dense")
        entries += layer_pair(f"level_{i}_adaptive/shift", f"adaptive.{i}.beta", "dense")
    return [*entries, *_cnn_out()]


def _cnn_out() -> list[Entry]:
    return [*norm_pair("norm_out", "norm_out"), *layer_pair("conv_out", "conv_out", "conv")]
