"""Table of the names of a prior's parameters, ours and PyTorch's, in the order of the original."""

import ml_collections

from gigatok_jax.weights.names import Entry, layer_pair, norm_pair, under

_QK_NORM = [
    *norm_pair("attention/query_norm", "attention.q_norm"),
    *norm_pair("attention/key_norm", "attention.k_norm"),
]
_MLP = [
    Entry("mlp/gate_up/kernel", "feed_forward.w1.weight", "dense", half=0),
    Entry("mlp/gate_up/kernel", "feed_forward.w3.weight", "dense", half=1),
    Entry("mlp/down/kernel", "feed_forward.w2.weight", "dense"),
]
_NORMS = [Entry("norm1/scale", "attention_norm.weight"), Entry("norm2/scale", "ffn_norm.weight")]
# Conditioning on the class: the first and last entries of a block, and those outside the blocks.
_FIRST = {"none": [], "full": [], "shared": [Entry("modulation", "ada_gss", "table")]}
_LAST = {"none": [], "full": layer_pair("modulation", "adaLN_modulation.1", "dense"), "shared": []}
_FINAL = layer_pair("final_modulation", "final_adaLN.1", "dense")
_OUTSIDE = {
    "none": [],
    "full": _FINAL,
    "shared": [*layer_pair("modulation", "adaLN.1", "dense"), *_FINAL],
}


def entries(model: ml_collections.ConfigDict) -> list[Entry]:
    """Lists our path and the original's name of every parameter of a prior."""
    block = _block(model)
    blocks = [under(block, "blocks/", f"layers.{i}.", layer=i) for i in range(model.layers)]
    return [
        *([] if model.rope else [Entry("positions", "positional_embedding")]),
        Entry("class_embedding/embedding", "cls_embedding.embedding_table.weight"),
        Entry("code_embedding/embedding", "tok_embeddings.weight"),
        *(entry for layer in blocks for entry in layer),
        Entry("norm/scale", "norm.weight"),
        Entry("head/kernel", "output.weight", "dense"),
        *_OUTSIDE[model.adaln],
    ]


def _block(model) -> list[Entry]:
    return [
        *_FIRST[model.adaln],
        Entry("attention/qkv/kernel", "attention.wqkv.weight", "dense"),
        Entry("attention/out/kernel", "attention.wo.weight", "dense"),
        *(_QK_NORM if model.qk_norm else []),
        *_MLP,
        *_NORMS,
        *_LAST[model.adaln],
    ]
