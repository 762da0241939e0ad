"""Blocks written a second time in PyTorch, with the original's names, give the same outputs.

Each twin reads a state dict of random tensors; ours reads the same through its name table.
"""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import trees
from gigatok_jax.models import ar, cnn, discriminator, layers
from gigatok_jax.weights import discriminator_names as convert_discriminator
from gigatok_jax.weights import names, prior_names, tokenizer_names

torch = pytest.importorskip("torch")
F = torch.nn.functional
WIDTH, HEADS = 64, 4


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pair(module, table, *inputs):
    """Our output, and the random state dict as PyTorch tensors."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    flat, rng, state = trees.flatten(shapes), np.random.default_rng(1), {}
    for name, outline in names.tensors(flat, table).items():
        scale = 0.1 if len(outline.shape) == 1 else np.prod(outline.shape[1:]) ** -0.5
        state[name] = (rng.normal(size=outline.shape) * scale).astype(np.float32)
        if name.endswith("norm.weight") or (".norm" in f".{name}" and name.endswith("weight")):
            state[name] += 1
    params = names.from_torch(state, table)
    ours = module.apply({"params": params}, *inputs)
    return ours, {name: torch.from_numpy(tensor) for name, tensor in state.items()}


def tensor(x):
    return torch.from_numpy(np.array(x))


def close(ours, theirs, atol=3e-5):
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), rtol=0, atol=atol)


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def layer_norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def heads_of(x, heads=HEADS):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [b h n d]


def joined(x):
    return x.transpose(1, 2).flatten(2)


def attention(state, name, q, k, v, qk_norm):
    """Multi-head attention: PyTorch's fused module, or projections and norms of their own."""
    if not qk_norm:
        return F.multi_head_attention_forward(
            *(x.transpose(0, 1) for x in (q, k, v)), WIDTH, HEADS,
            state[f"{name}.in_proj_weight"], state[f"{name}.in_proj_bias"], None, None, False, 0.0,
            state[f"{name}.out_proj.weight"], state[f"{name}.out_proj.bias"], need_weights=False,
        )[0].transpose(0, 1)  # fmt: skip
    q, k, v = (
        heads_of(linear(state, f"{name}.{part}_proj", x))
        for part, x in zip("qkv", (q, k, v), strict=True)
    )
    q, k = layer_norm(state, f"{name}.q_norm", q), layer_norm(state, f"{name}.k_norm", k)
    return linear(state, f"{name}.wo", joined(F.scaled_dot_product_attention(q, k, v)))


def feed_forward(state, x):
    return linear(state, "linear2", F.gelu(linear(state, "linear1", x)))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_qformer_block(qk_norm):
    model = types.SimpleNamespace(kind="1d", qk_norm=qk_norm)
    x, memory, at, at_memory = normal(2, 2, 5, WIDTH), normal(3, 2, 7, WIDTH), *(
        normal(4, 5, WIDTH), normal(5, 7, WIDTH)
    )  # fmt: skip
    module = layers.QFormerBlock(HEADS, qk_norm)
    (ours, _), state = pair(module, tokenizer_names._block(model), x, memory, at, at_memory)
    y, memory, at, at_memory = map(tensor, (x, memory, at, at_memory))
    normed = layer_norm(state, "norm1", y)
    query = normed + at
    y = y + attention(state, "self_attn", query, query, normed, qk_norm)
    query = layer_norm(state, "norm2", y) + at
    y = y + attention(state, "multihead_attn", query, memory + at_memory, memory, qk_norm)
    close(ours, y + feed_forward(state, layer_norm(state, "norm3", y)))


def test_the_transformer_block():
    model = types.SimpleNamespace(kind="2d", layer_2d="transformer", qk_norm=False)
    x = normal(6, 2, 5, WIDTH)
    (ours, _), state = pair(layers.TransformerBlock(HEADS), tokenizer_names._block(model), x)
    y = tensor(x)
    normed = layer_norm(state, "norm1", y)
    y = y + attention(state, "self_attn", normed, normed, normed, False)
    close(ours, y + feed_forward(state, layer_norm(state, "norm2", y)))


def test_the_alignment_mlp():
    x = normal(7, 2, 5, 16)
    table = names.under(tokenizer_names._ALIGN, "", "distill_mlp.")
    ours, state = pair(layers.AlignmentMLP(12), table, x)
    y = tensor(x)
    for name in ("0", "2"):
        y = F.silu(linear(state, f"distill_mlp.{name}", y))
    close(ours, linear(state, "distill_mlp.4", y))


def images(x):
    return tensor(x).permute(0, 3, 1, 2)


def close_images(ours, theirs):
    close(ours, theirs.permute(0, 2, 3, 1))


def group_norm(state, name, x):
    weights = (state[f"{name}.weight"], state[f"{name}.bias"]) if name else (None, None)
    return F.group_norm(x, 32, *weights, 1e-6)


def conv(state, name, x, padding=1, **options):
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding, **options)


@pytest.mark.parametrize("features", [32, 64])
def test_the_residual_block(features):
    x = normal(8, 2, 6, 4, 32)
    table = [
        entry._replace(path=entry.path.removeprefix("b/"), name=entry.name.removeprefix("b."))
        for entry in tokenizer_names._resnet("b", "b", features != 32)
    ]
    ours, state = pair(cnn.ResnetBlock(features), table, x)
    x = images(x)
    y = conv(state, "conv1", F.silu(group_norm(state, "norm1", x)))
    y = conv(state, "conv2", F.silu(group_norm(state, "norm2", y)))
    shortcut = conv(state, "nin_shortcut", x, padding=0) if features != 32 else x
    close_images(ours, shortcut + y)


def test_attention_between_convolutions():
    x = normal(9, 2, 3, 4, 32)
    ours, state = pair(cnn.SpatialAttention(), tokenizer_names._CNN_ATTENTION, x)
    x = images(x)
    y = group_norm(state, "norm", x)
    q, k, v = (conv(state, name, y, padding=0).flatten(2) for name in "qkv")  # [b c hw]
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(32), dim=2)
    y = torch.einsum("bij,bcj->bci", weights, v).unflatten(2, (3, 4))
    close_images(ours, x + conv(state, "proj_out", y, padding=0))


def test_adaptive_group_norm():
    x, style = normal(10, 2, 4, 6, 64), normal(11, 2, 3, 2, 16)
    table = [
        *names.layer_pair("scale", "gamma", "dense"),
        *names.layer_pair("shift", "beta", "dense"),
    ]
    ours, state = pair(cnn.AdaptiveGroupNorm(), table, x, style)
    flat = images(style).flatten(2)
    scale = linear(state, "gamma", (flat.var(dim=2) + 1e-6).sqrt())[:, :, None, None]
    shift = linear(state, "beta", flat.mean(dim=2))[:, :, None, None]
    close_images(ours, scale * group_norm(state, "", images(x)) + shift)


def test_depth_to_space_is_a_rearranged_pixel_shuffle():
    x = normal(12, 2, 3, 4, 4 * 5)
    offsets_last = images(x).unflatten(1, (4, 5)).transpose(1, 2).flatten(1, 2)
    close_images(cnn.depth_to_space(jnp.asarray(x)), F.pixel_shuffle(offsets_last, 2))


def rms_norm(state, name, x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * state[f"{name}.weight"]


@pytest.mark.parametrize("adaln, qk_norm, kv_heads", [
    ("none", False, HEADS), ("full", True, HEADS), ("shared", False, 2),
])  # fmt: skip
def test_the_priors_block(adaln, qk_norm, kv_heads):
    model = types.SimpleNamespace(adaln=adaln, qk_norm=qk_norm)
    module = ar.Block(HEADS, kv_heads, qk_norm, adaln)
    x, condition, shared = (
        normal(13, 2, 5, WIDTH),
        normal(14, 2, 1, WIDTH),
        normal(15, 2, 1, 6 * WIDTH),
    )
    given = ar.Shared(rotary=None, condition=condition, modulation=shared)
    (ours, _), state = pair(module, prior_names._block(model), x, 0.0, given)
    if adaln == "full":
        steps = linear(state, "adaLN_modulation.1", F.silu(tensor(condition))).chunk(6, -1)
    elif adaln == "shared":
        steps = (tensor(shared) + state["ada_gss"].flatten(1)[:, None]).chunk(6, -1)
    else:
        steps = [torch.zeros(1), torch.zeros(1), torch.ones(1)] * 2
    shift, scale, gate, shift2, scale2, gate2 = steps
    y = tensor(x)
    normed = rms_norm(state, "attention_norm", y) * (1 + scale) + shift
    y = y + gate * causal(state, normed, kv_heads, qk_norm)
    normed = rms_norm(state, "ffn_norm", y) * (1 + scale2) + shift2
    hidden = F.silu(linear(state, "feed_forward.w1", normed)) * linear(
        state, "feed_forward.w3", normed
    )
    close(ours, y + gate2 * linear(state, "feed_forward.w2", hidden))


def causal(state, x, kv_heads, qk_norm):
    head = WIDTH // HEADS
    sizes = [WIDTH, kv_heads * head, kv_heads * head]
    q, k, v = linear(state, "attention.wqkv", x).split(sizes, dim=-1)
    q, k, v = heads_of(q), heads_of(k, kv_heads), heads_of(v, kv_heads)
    if qk_norm:
        q = layer_norm(state, "attention.q_norm", q)
        k = layer_norm(state, "attention.k_norm", k)
    k, v = (y.repeat_interleave(HEADS // kv_heads, dim=1) for y in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return linear(state, "attention.wo", joined(y))


def test_the_patchgan():
    x = normal(16, 2, 32, 32, 3)
    module = discriminator.PatchGAN(4)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))
    table, rng = convert_discriminator.entries("patchgan"), np.random.default_rng(2)
    state = {}
    for name, outline in names.tensors(trees.flatten(shapes), table).items():
        scale = np.prod(outline.shape[1:]) ** -0.5
        state[name] = (rng.normal(size=outline.shape) * scale).astype(outline.dtype)
        if name.endswith("running_var"):
            state[name] = np.abs(state[name]) + 0.5
    ours = module.apply(convert_discriminator.from_torch(state, "patchgan"), x, train=False)
    state = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    y = F.leaky_relu(conv(state, "main.0", images(x), stride=2), 0.2)
    for i, stride in ((2, 2), (5, 2), (8, 1)):
        y = F.conv2d(y, state[f"main.{i}.weight"], stride=stride, padding=1)
        norm = [
            state[f"main.{i + 1}.{leaf}"]
            for leaf in ("running_mean", "running_var", "weight", "bias")
        ]
        y = F.leaky_relu(F.batch_norm(y, *norm, eps=1e-5), 0.2)
    close_images(ours, conv(state, "main.11", y))
