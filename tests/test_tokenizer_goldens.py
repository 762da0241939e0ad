"""The tokenizer computes what the original computes, stage by stage. Weights are by rule."""

import functools

import jax
import numpy as np
import pytest
import rule
from PIL import Image

from gigatok_jax import trees
from gigatok_jax.model_config import tokenizer as tokenizer_config
from gigatok_jax.models import qformer
from gigatok_jax.models.tokenizer import make
from gigatok_jax.weights import names, tokenizer_names

PORTABLE = ["tok_tiny_a", "tok_tiny_b", "tok_tiny_c", "tok_tiny_2d"]
TINY = ["tiny_a", "tiny_b", "tiny_c", "tiny_d_qknorm", "tiny_e_meanquery", "tiny_f_learnquery"]
FULL = [*TINY, "tiny_2d", "VQ_SS256", "VQ_SB256", "VQ_BL256", "VQ_SS256_2d", "VQ_BL256_2d"]


def model_of(meta: dict):
    """Our config for the arguments that the golden's model was built with."""
    args = meta["model_args"]
    two_d = meta["name"].endswith("2d")
    query = "multi_level" if args.get("multi_level_query_init") else "mean"
    plain = args.get("transformer_layer_type") == "TransformerLayer"
    return tokenizer_config(
        kind="2d" if two_d else "1d",
        encoder=args["encoder_size"] or args["model_size"],
        decoder=args["decoder_size"] or args["model_size"],
        latent_tokens=args["num_latent_tokens"],
        codebook_size=args["codebook_size"],
        l2_norm=args["codebook_l2_norm"],
        rotation=args["rot"],
        query_init="learnable" if args.get("learnable_1d_query_init") else query,
        decoder_query_init="learnable" if args.get("learnable_2d_query_init") else "first",
        layer_2d="transformer" if plain else "qformer",
        adaptive_group_norm=args["adaptive_gn"],
        depth_to_space=args["d2s_up"],
        cnn_attention=args["use_attn"],
        qk_norm=args.get("use_qk_norm", False),
        align_block=args["distill_depth"],
        align_width=args["out_inner_dim"],
    )


class RuleState(dict):
    """A state dict whose tensors are drawn when they are read, so that none is held twice."""

    def __init__(self, shapes):
        super().__init__(shapes)

    def __getitem__(self, name):
        shape = super().__getitem__(name)
        tensor = rule.rule_tensor(name, shape)
        return np.zeros(shape, np.float32) if tensor is None else tensor


def rule_params(model, keep: tuple[str, ...] = ()) -> dict:
    """Parameters by rule, through the name table of the conversion; `keep` are top-level names."""
    module = make(model)
    size = model.image_size
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, size, size, 3), "f4"))
    entries = tokenizer_names.entries(model)
    state = {}
    for entry in entries:
        if entry.path.startswith("buffers/"):
            state[entry.name] = (65536,)
            continue
        leaf = rule_shape(entry, trees.flatten(shapes["params"])[entry.path].shape)
        state[entry.name] = leaf
    kept = [e for e in entries if not keep or e.path.split("/")[0] in keep]
    params = names.from_torch(RuleState(state), kept)
    params.pop("buffers", None)
    return params


def rule_shape(entry, shape) -> tuple[int, ...]:
    """Shape of the original's tensor from the shape of our array."""
    shape = shape if entry.layer is None else shape[1:]
    there = names.LAYOUTS[entry.layout][1](np.empty(shape, np.bool_)).shape
    return there if entry.part is None else (3 * there[0], *there[1:])


def channels_first(x, grid: bool) -> np.ndarray:
    """[b n c] or [b h w c] in the original's layout [b c 1 n] or [b c h w]."""
    x = np.asarray(x)
    if x.ndim == 3:
        b, n, c = x.shape
        side = int(n**0.5)
        x = x.reshape(b, side, side, c) if grid else x[:, None]
    return x.transpose(0, 3, 1, 2)


def check(name, ours, golden, atol=2e-4):
    assert ours.shape == golden.shape, name
    np.testing.assert_allclose(ours, golden, rtol=0, atol=atol, err_msg=name)


def check_codes(codes, golden):
    """Equal, or the second choice where the two nearest rows are closer than 1e-4."""
    near = (golden["gap"] < 1e-4) & (codes == golden["second_indices"])
    assert np.all((codes == golden["indices"]) | near)


def check_encoding(encoding, golden, grid):
    first = functools.partial(channels_first, grid=grid)
    check("cnn_feat", first(encoding.features)[:, ::8], golden["cnn_feat_c8"])
    check("vit_feat", first(encoding.tokens)[:, ::8], golden["vit_feat_c8"])
    check("conv_out", first(encoding.projected)[:, ::8], golden["conv_out_c8"])
    check("pre_quant", first(encoding.latents), golden["pre_quant"])
    codes = np.asarray(encoding.quantized.codes)
    check_codes(codes, golden)
    same = (codes == golden["indices"])[:, None]
    ours = first(encoding.quantized.latents)
    same = same.reshape(len(codes), 1, *ours.shape[2:])
    check("quant", np.where(same, ours, golden["quant"]), golden["quant"])


def check_decoding(decoding, from_codes, golden):
    check("probe", np.asarray(decoding.tapped)[:, ::4, ::8], golden["probe_feat_t4c8"])
    check("inner", np.asarray(decoding.aligned)[:, ::4, ::8], golden["inner_t4c8"])
    check("rec", channels_first(decoding.features, True)[:, ::8], golden["rec_spatial_c8"])
    images = channels_first(decoding.images, True)
    check("dec", images[:, :, ::4, ::4], golden["dec_s4"])
    images = channels_first(from_codes, True)
    check("code_dec", images[:, :, ::4, ::4], golden["code_dec_s4"])


def quantized_latents(golden) -> np.ndarray:
    """The golden's quantized latents as [b n e]."""
    quant = golden["quant"]
    return quant.reshape(*quant.shape[:2], -1).transpose(0, 2, 1)


def photographs(meta) -> np.ndarray:
    folder = rule.shared_path("images")
    images = [np.asarray(Image.open(folder / f"{name}.png")) for name in meta["images"]]
    return np.stack(images)


def run_encoder(model, images, golden):
    module, params = (
        make(model),
        rule_params(model, ("cnn_encoder", "encoder", "pre_quant", "quantizer")),
    )
    encode = jax.jit(functools.partial(module.apply, method="encode"))
    check_encoding(encode({"params": params}, rule.pixels(images)), golden, model.kind == "2d")


def run_decoder(model, golden):
    module, params = (
        make(model),
        rule_params(model, ("decoder", "cnn_decoder", "post_quant", "quantizer")),
    )
    # One compiled program for both: the codes become latents first.
    latents = quantized_latents(golden)
    lookup = module.apply(
        {"params": params}, golden["code_in"], method=lambda m, c: m.quantizer.lookup(c)
    )
    decode = jax.jit(functools.partial(module.apply, method="decode"))
    both = decode({"params": params}, np.concatenate([latents, np.asarray(lookup)]))
    first = jax.tree.map(lambda x: x[:-1], both)
    check_decoding(first, both.images[-1:], golden)


@pytest.mark.parametrize("name", PORTABLE)
def test_tiny_tokenizers_on_block_images(name):
    golden, meta = rule.load(rule.GOLDEN / f"{name}.npz")
    model = model_of(meta)
    run_encoder(model, rule.block_images()[:2], golden)
    run_decoder(model, golden)


QUERIES = {"last": "last_level", "multi": "multi_level"}


@pytest.mark.parametrize("latent_tokens", [2, 16, 64])
@pytest.mark.parametrize("name", QUERIES)
def test_queries_by_region(name, latent_tokens):
    golden, _ = rule.load(rule.GOLDEN / "decoder_queries.npz")
    ours = qformer.region_queries(golden[f"latents_{latent_tokens}"], 8, QUERIES[name])
    np.testing.assert_allclose(ours, golden[f"{name}_{latent_tokens}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", QUERIES)
def test_decoders_with_queries_by_region(name):
    golden, _ = rule.load(rule.GOLDEN / "decoder_queries.npz")
    sizes = {"encoder": "tiny", "decoder": "tiny", "image_size": 64, "latent_tokens": 16}
    model = tokenizer_config(**sizes, stem="patch", align_block=0, decoder_query_init=QUERIES[name])
    params = rule_params(model, ("decoder",))["decoder"]
    latents = quantized_latents({"quant": golden["z"]})
    decoded = jax.jit(make(model).decoder.apply)({"params": params}, latents)
    features = channels_first(decoded.features, True)[:, ::8]
    check("features", features, golden[f"features_{name}_c8"])


@pytest.mark.goldens
@pytest.mark.parametrize("name", [*FULL, "VQ_XLXXL256"])
def test_tokenizers_on_photographs(name):
    golden, meta = rule.load(rule.shared_path(f"tok_{name}.npz"))
    model = model_of(meta)
    run_encoder(model, photographs(meta), golden)
    run_decoder(model, golden)
