"""Facts about the networks of the tokenizer, and their conversion from and to PyTorch."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tokenizer_goldens import rule_shape

from gigatok_jax import trees
from gigatok_jax.conversion import tokenizer as convert
from gigatok_jax.errors import CheckpointError, ConfigError
from gigatok_jax.model_config import num_tokens
from gigatok_jax.model_config import tokenizer as model_config
from gigatok_jax.models import cnn, layers, qformer, tokenizer, vit2d
from gigatok_jax.weights import names, tokenizer_names


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def normal(seed, *shape) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_params(module, *inputs, scale=0.3, **options) -> dict:
    """Parameters drawn by numpy for a module and its inputs."""
    shapes = jax.eval_shape(functools.partial(module.init, **options), jax.random.key(0), *inputs)
    rng = np.random.default_rng(0)
    draw = lambda x: (rng.normal(size=x.shape) * scale).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, shapes["params"])


# Pieces.


def test_depth_to_space_reads_offsets_before_channels():
    x = normal(0, 2, 3, 4, 4 * 5)
    out = np.asarray(cnn.depth_to_space(x))
    assert out.shape == (2, 6, 8, 5)
    for dy in range(2):
        for dx in range(2):
            first = (2 * dy + dx) * 5
            np.testing.assert_array_equal(out[:, dy::2, dx::2], x[..., first : first + 5])


def test_adaptive_group_norm_takes_the_unbiased_deviation():
    module, x, style = cnn.AdaptiveGroupNorm(), normal(1, 2, 4, 4, 64), normal(2, 2, 3, 3, 16)
    params = random_params(module, x, style)
    flat = style.reshape(2, 9, 16).astype(np.float64)
    variance = np.square(flat - flat.mean(1, keepdims=True)).sum(1) / 8
    linear = lambda name, v: v @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    scale = linear("scale", np.sqrt(variance + 1e-6))[:, None, None]
    shift = linear("shift", flat.mean(1))[:, None, None]
    grouped = x.reshape(2, 16, 32, 2).astype(np.float64)  # 32 groups of neighbouring channels
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    normed = centred / np.sqrt(np.square(centred).mean((1, 3), keepdims=True) + 1e-6)
    expected = scale * normed.reshape(x.shape) + shift
    out = module.apply({"params": params}, x, style)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("count", [1, 2, 4, 16, 128, 256])
def test_pooled_queries_go_from_coarse_to_fine(count):
    grid = normal(count, 2, 16, 16, 3)
    expected = [grid.mean((1, 2))]  # the mean comes twice
    level = 0
    while len(expected) < count:
        columns, rows = 2 ** ((level + 1) // 2), 2 ** (level // 2)  # widths split before heights
        high, wide = 16 // rows, 16 // columns
        for i in range(rows):
            for j in range(columns):
                tile = grid[:, i * high : (i + 1) * high, j * wide : (j + 1) * wide]
                expected.append(tile.mean((1, 2)))
        level += 1
    out = qformer.pooled_queries(jnp.asarray(grid), count)
    np.testing.assert_allclose(out, np.stack(expected, axis=1), rtol=0, atol=1e-6)


# Stacks of blocks.

CONTEXT = (normal(4, 2, 6, 16), normal(5, 5, 16), normal(6, 6, 16))  # memory and both positions


class Stack(nn.Module):
    loop: layers.Loop = layers.SCANNED

    @nn.compact
    def __call__(self, x, *context):
        block = layers.scan(layers.QFormerBlock, 3, self.loop, name="blocks", heads=2)
        return block(x, *context)[0]


def test_a_scanned_stack_is_its_blocks_one_after_the_other():
    x = normal(3, 2, 5, 16)
    params = random_params(Stack(), x, *CONTEXT)
    expected, block = x, layers.QFormerBlock(heads=2)
    for i in range(3):
        layer = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        expected, _ = block.apply({"params": layer}, expected, *CONTEXT)
    out = Stack().apply({"params": params}, x, *CONTEXT)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)


def gradients_of_a_stack(loop: layers.Loop):
    """Compiled, and its parameters."""
    x, weights = normal(3, 2, 5, 16), normal(7, 2, 5, 16)
    params = random_params(Stack(), x, *CONTEXT)
    loss = lambda p: jnp.sum(Stack(loop).apply({"params": p}, x, *CONTEXT) * weights)  # noqa: E731
    return jax.jit(jax.grad(loss)).lower(params).compile(), params


@pytest.fixture(scope="module")
def scanned():
    """Gradients of a stack that recomputes nothing."""
    program, params = gradients_of_a_stack(layers.SCANNED)
    return flax.traverse_util.flatten_dict(program(params), sep="/")


def test_what_is_recomputed_takes_less_memory():
    # From what keeps most to what keeps least; "full" is "blocks" here.
    made = {name: gradients_of_a_stack(layers.Loop(name))[0] for name in ("none", "dots", "blocks")}
    assert made.keys() == set(layers.REMAT) - {"full"}
    sizes = [one.memory_analysis().temp_size_in_bytes for one in made.values()]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("unroll", [(), ("cpu",)])
@pytest.mark.parametrize("remat", ["none", "dots", "blocks"])
def test_a_stack_has_the_same_gradients_however_it_is_compiled(scanned, remat, unroll):
    program, params = gradients_of_a_stack(layers.Loop(remat, unroll))
    assert ("while" in program.as_text()) is not bool(unroll)
    made = flax.traverse_util.flatten_dict(program(params), sep="/")
    assert made.keys() == scanned.keys()
    for name, ours in made.items():
        bound = 1e-6 * np.abs(scanned[name]).max()
        if name.endswith("key/bias"):  # moves all scores of a query alike: 0, and rounding here
            bound = 1e-5 if unroll else bound + 1e-6
        np.testing.assert_allclose(ours, scanned[name], rtol=0, atol=bound, err_msg=name)


def test_recomputing_a_cnn_does_not_change_its_gradients():
    x, weights = normal(8, 1, 4, 4, 3), normal(9, 1, 2, 2, 256)
    params = random_params(cnn.CNNEncoder(32, 2), x, scale=0.05)

    def grads(remat):
        module = cnn.CNNEncoder(32, 2, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x) * weights)))(
            params
        )

    for ours, theirs in zip(*map(jax.tree.leaves, (grads(True), grads(False))), strict=True):
        bound = 1e-4 * np.abs(theirs).max() + 1e-6
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)


def test_the_2d_qformer_reads_its_own_input():
    """At every block the memory is what enters the block, without a norm."""
    module = vit2d.Encoder2D(layers=2, heads=2, width=32, layer="qformer")
    features = normal(10, 1, 2, 2, 256)
    params = random_params(module, features, scale=0.1)
    norm = layers.layer_norm(jnp.float32, None)
    flat = norm.apply({"params": params["norm_in"]}, features.reshape(1, 4, 256))
    x = flat @ params["embed"]["kernel"] + params["embed"]["bias"]
    block, positions = layers.QFormerBlock(heads=2), params["positions"]
    for i in range(2):
        layer = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        x, _ = block.apply({"params": layer}, x, x, positions, positions)
    tokens = norm.apply({"params": params["norm_out"]}, x)
    out = module.apply({"params": params}, features)
    np.testing.assert_allclose(out.tokens, tokens, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "query_init, matters", [("first", [0]), ("learnable", []), ("last_level", [2, 3])]
)
def test_decoder_queries_depend_on_their_latents(query_init, matters):
    """With its cross-attention silenced the decoder depends on nothing but its queries."""
    module = qformer.QFormerDecoder(3, 2, 32, grid=2, query_init=query_init, align_block=0)
    latents = normal(11, 1, 4, 256)
    params = random_params(module, latents)
    params["blocks"]["cross_attention"]["out"] = jax.tree.map(
        np.zeros_like, params["blocks"]["cross_attention"]["out"]
    )
    decode = jax.jit(lambda x: module.apply({"params": params}, x).features)
    base = decode(latents)
    for token in range(4):
        changed = latents.copy()
        changed[:, token] += 1
        assert np.array_equal(decode(changed), base) == (token not in matters)


# Whole models, by shape.


def shapes_of(model):
    side = model.image_size
    module = tokenizer.make(model)
    images = jnp.zeros((2, side, side, 3))
    return jax.eval_shape(module.init_with_output, jax.random.key(0), images)


@pytest.mark.parametrize("count", [1, 2, 8, 256, 512])
def test_every_power_of_two_of_latent_tokens_works(count):
    (encoding, decoding), _ = shapes_of(
        model_config(encoder="pico", decoder="pico", stem="patch", latent_tokens=count)
    )
    assert encoding.quantized.codes.shape == (2, count)
    assert decoding.images.shape == (2, 256, 256, 3)
    assert decoding.aligned.shape == (2, 256, 768)


@pytest.mark.parametrize("count", [0, 3, 100, 1024])
def test_other_numbers_of_latent_tokens_are_refused(count):
    with pytest.raises(ConfigError, match=f"latent_tokens is {count}") as refused:
        model_config(latent_tokens=count)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind, size", [("1d", 32), ("1d", 384), ("2d", 512)])
def test_other_image_sizes_build(kind, size):
    small = {"encoder": "pico", "decoder": "pico", "cnn_channels": 32, "latent_tokens": 4}
    model = model_config(kind=kind, image_size=size, **small)
    (encoding, decoding), _ = shapes_of(model)
    assert encoding.quantized.codes.shape == (2, num_tokens(model))
    assert decoding.images.shape == (2, size, size, 3)


@pytest.mark.parametrize("size", [0, 8, 250, 264])
def test_an_image_that_the_grid_does_not_fit_is_refused(size):
    with pytest.raises(ConfigError, match=f"image_size is {size}, expected a multiple of 16"):
        model_config(image_size=size)


def test_queries_that_the_grid_cannot_pool_are_refused():
    with pytest.raises(ConfigError, match="latent_tokens is 256"):
        model_config(image_size=128)  # a grid of 8 x 8


PATHS = {  # a file format: a rename breaks every checkpoint
    "cnn_encoder/level_0_block_0/conv1/kernel": (3, 3, 128, 128),
    "cnn_encoder/level_3_down/kernel": (3, 3, 256, 256),
    "encoder/query_positions": (256, 512),
    "encoder/query_proj/kernel": (512, 512),
    "encoder/blocks/cross_attention/query/kernel": (6, 512, 512),
    "encoder/blocks/mlp/up/kernel": (6, 512, 2048),
    "encoder/proj_out/kernel": (512, 256),
    "pre_quant/kernel": (256, 8),
    "quantizer/codebook": (16384, 8),
    "post_quant/kernel": (8, 256),
    "decoder/blocks_to_tap/self_attention/out/bias": (3, 512),
    "decoder/blocks/norm3/scale": (3, 512),
    "decoder/align/dense_2/kernel": (512 * 4, 768),
    "decoder/conv_out/kernel": (3, 3, 512, 256),
    "cnn_decoder/level_0_adaptive/scale/kernel": (256, 512),
    "cnn_decoder/level_0_up/kernel": (3, 3, 512, 2048),
    "cnn_decoder/conv_out/kernel": (3, 3, 128, 3),
}


def test_parameter_paths_are_a_file_format():
    _, variables = shapes_of(model_config())
    found = {path: trees.flatten(variables["params"])[path].shape for path in PATHS}
    assert found == PATHS


# Conversion.

SMALL = {"encoder": "pico", "decoder": "pico", "codebook_size": 32, "latent_tokens": 4}
SMALL |= {"cnn_channels": 32, "patch_size": 4, "image_size": 16}
VARIANTS = {
    "1d": {},
    "qk_norm": {"qk_norm": True},
    "attention": {"cnn_attention": True},
    "mean": {"query_init": "mean"},
    "learnable": {"query_init": "learnable", "decoder_query_init": "learnable"},
    "plain": {"depth_to_space": False, "adaptive_group_norm": False, "align_block": 0},
    "all_tapped": {"align_block": 3},
    "2d": {"kind": "2d"},
    "2d_qformer": {"kind": "2d", "layer_2d": "qformer"},
}


def random_state(model):
    """A PyTorch state dict of random numbers for a model, and the shapes of our parameters."""
    _, variables = shapes_of(model)
    rng, state = np.random.default_rng(0), {}
    for entry in tokenizer_names.entries(model):
        if entry.path.startswith("buffers/"):
            shape = (65536,)
        else:
            shape = rule_shape(entry, trees.flatten(variables["params"])[entry.path].shape)
        state[entry.name] = rng.normal(size=shape).astype(np.float32)
    return state, variables["params"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_the_same_state_dict(variant):
    model = model_config(**SMALL | VARIANTS[variant])
    state, shapes = random_state(model)
    params = convert.from_torch(state, model)
    back = convert.to_torch(params, model)
    assert list(back) == list(state)
    for name in state:
        assert back[name].dtype == state[name].dtype
        np.testing.assert_array_equal(back[name], state[name], err_msg=name)
    params.pop("buffers")
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, shapes)


def test_training_code_writes_a_whole_state_dict():
    model = model_config(**SMALL)
    state, _ = random_state(model)
    params = convert.from_torch(state, model)
    params.pop("buffers")  # parameters know of no history
    back = convert.to_torch(params, model)
    assert list(back) == list(state)
    np.testing.assert_array_equal(back["quantize.codebook_used"], np.zeros(65536))


def test_a_state_dict_of_another_model_is_refused():
    model = model_config(**SMALL)
    state, _ = random_state(model)
    for name in ("quant_conv.weight", "encoder.conv_in.bias"):
        del state[name]
    with pytest.raises(CheckpointError, match=r"2 tensors are missing, first encoder\.conv_in"):
        convert.from_torch(state, model)


def test_scalars_stay_scalars_on_the_way():
    table = [names.Entry("count", "num_batches_tracked"), names.Entry("stack", "n", layer=0)]
    state = {"num_batches_tracked": np.int64(7), "n": np.float32(2)}
    params = names.from_torch(state, table)
    assert (params["count"].shape, params["stack"].shape) == ((), (1,))
    back = names.to_torch(params, table)
    assert {name: (x.shape, int(x)) for name, x in back.items()} == {
        "num_batches_tracked": ((), 7), "n": ((), 2),
    }  # fmt: skip


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_torchs_with_fused_projections(heads):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.MultiheadAttention(32, heads, batch_first=True).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.from_numpy(normal(parameter.numel(), *parameter.shape) * 0.3))
    query, key, value = normal(20, 2, 5, 32), normal(21, 2, 7, 32), normal(22, 2, 7, 32)
    expected = theirs(*map(torch.from_numpy, (query, key, value)))[0].detach().numpy()
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = names.from_torch(state, tokenizer_names._FUSED)
    out = layers.Attention(heads).apply({"params": params}, query, key, value)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)


def torch_conv(conv, x, **options) -> np.ndarray:
    """Convolution of NHWC numpy by PyTorch with our HWIO kernel."""
    torch = pytest.importorskip("torch")
    kernel = torch.from_numpy(conv["kernel"].transpose(3, 2, 0, 1).copy())
    image = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    if pad := options.pop("pad", None):
        image = torch.nn.functional.pad(image, pad)
    out = torch.nn.functional.conv2d(image, kernel, torch.from_numpy(conv["bias"]), **options)
    return out.numpy().transpose(0, 2, 3, 1)


def test_downsampling_pads_below_and_to_the_right():
    module = cnn.conv(6, jnp.float32, None, stride=2, padding=((0, 1), (0, 1)))
    x = normal(30, 2, 8, 8, 4)
    params = random_params(module, x)
    expected = torch_conv(params, x, stride=2, pad=(0, 1, 0, 1))
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=0, atol=1e-5)


def test_upsampling_is_a_convolution_then_blocks():
    module, x = cnn.conv(4 * 6, jnp.float32, None), normal(31, 2, 4, 4, 6)
    params = random_params(module, x)
    wide = torch_conv(params, x, padding=1)  # [b h w 4c]
    expected = wide.reshape(2, 4, 4, 2, 2, 6).transpose(0, 1, 3, 2, 4, 5).reshape(2, 8, 8, 6)
    ours = cnn.depth_to_space(module.apply({"params": params}, x))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)
