"""Facts about the prior: what each option computes, in whole passes and one position at a time."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from test_conversion_ar import rule_params

from gigatok_jax import losses, model_config
from gigatok_jax.errors import ConfigError
from gigatok_jax.models import ar, ar_decoding, layers, parameters

SMALL = {"layers": 2, "heads": 4, "width": 32, "vocab": 16, "tokens": 8, "classes": 3}
OPTIONS = {
    "plain": {},
    "full": {"adaln": "full"},
    "shared": {"adaln": "shared"},
    "qk_norm": {"qk_norm": True},
    "rope": {"rope": True},
    "grouped": {"kv_heads": 2},
    "all": {"adaln": "shared", "qk_norm": True, "rope": True, "kv_heads": 2},
}
NOTHING = ar.Dropouts(token=0.0, residual=0.0, condition=0.0, path=0.0)


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def normal(seed, *shape) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(seed, high, *shape) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.int32)


def small(option="plain", **fields):
    return model_config("prior-B", **SMALL | OPTIONS[option] | fields)


@functools.cache
def build(option="plain", **fields):
    """Config, module and parameters by rule, which stay as they are."""
    model = small(option, **fields)
    return model, ar.make(model), rule_params(model)


def draw(module, *inputs, scale=0.2) -> dict:
    """Parameters drawn by numpy for a module and its inputs."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(np.float32), shapes)


def share_is(measured, rate, count):
    """A share of `count` draws is within four deviations of its probability."""
    assert abs(measured - rate) <= 4 * (rate * (1 - rate) / count) ** 0.5


# Whole sequences and one position at a time.


@functools.partial(jax.jit, static_argnums=0)
def full(prior, params, class_ids, codes):
    return prior.apply({"params": params}, class_ids, codes)


@functools.partial(jax.jit, static_argnums=0)
def cached(prior, params, class_ids, codes, cache=None):
    """Logits f32[b n v] of all codes, each from a cache of the ones before it."""
    cache = ar_decoding.empty_cache(prior, len(class_ids)) if cache is None else cache
    first, cache = ar_decoding.prefill(prior, params, class_ids, cache)

    def body(cache, item):
        code, position = item
        place = ar.Place(position, prior.tokens)
        logits, cache = ar_decoding.decode_step(prior, params, code, cache, place)
        return cache, logits

    positions = jnp.arange(1, codes.shape[1])
    _, rest = jax.lax.scan(body, cache, (codes[:, :-1].T, positions))
    return jnp.concatenate([first[None], rest]).swapaxes(0, 1)


@pytest.mark.parametrize("option", OPTIONS)
def test_cached_decoding_is_the_full_pass(option):
    _, prior, params = build(option)
    class_ids, codes = np.array([0, 2, 3], np.int32), integers(0, 16, 3, 8)
    whole = full(prior, params, class_ids, codes)
    assert np.std(whole) > 0.3
    ours = cached(prior, params, class_ids, codes)
    np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-5)


def test_a_used_cache_is_as_good_as_an_empty_one():
    """Later positions are not read; unstacked parameters give the same."""
    _, prior, params = build("all")
    class_ids, codes = np.array([1, 3], np.int32), integers(0, 16, 2, 8)
    used = jax.tree.map(lambda x: normal(1, *x.shape) * 50, ar_decoding.empty_cache(prior, 2))
    apart = params | {"blocks": ar_decoding.unstack(params["blocks"])}
    ours = cached(prior, apart, class_ids, codes, used)
    np.testing.assert_array_equal(ours, cached(prior, params, class_ids, codes))


def test_reading_less_of_the_cache_is_the_same():
    _, prior, params = build()
    ids, code = np.array([1], np.int32), np.array([5], np.int32)

    @functools.partial(jax.jit, static_argnums=1)
    def second(params, read):
        _, cache = ar_decoding.prefill(prior, params, ids, ar_decoding.empty_cache(prior, 1))
        return ar_decoding.decode_step(prior, params, code, cache, ar.Place(jnp.int32(1), read))[0]

    np.testing.assert_allclose(second(params, 2), second(params, 8), rtol=0, atol=1e-6)


def test_fewer_codes_are_the_beginning_of_more():
    _, prior, params = build("all")
    class_ids, codes = np.array([0, 3], np.int32), integers(2, 16, 2, 8)
    whole = full(prior, params, class_ids, codes)
    part = full(prior, params, class_ids, codes[:, :5])
    np.testing.assert_allclose(part, whole[:, :5], rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", ["full", "all"])
def test_logits_depend_on_earlier_codes_alone(option):
    """By gradients: every code occurs once, so a row of the table is one place of one image."""
    _, prior, params = build(option)
    codes = np.random.default_rng(3).permutation(16).reshape(2, 8).astype(np.int32)
    class_ids, weights = np.array([0, 2], np.int32), normal(4, 16)

    @jax.jit
    @jax.jacrev
    def slopes(tables):
        logits = prior.apply({"params": params | tables}, class_ids, codes)
        return logits[0] @ weights

    tables = {name: params[name] for name in ("code_embedding", "class_embedding")}
    slopes = {name: np.abs(x["embedding"]).max(-1) for name, x in slopes(tables).items()}
    by_code, by_class = slopes["code_embedding"], slopes["class_embedding"]  # [n rows]
    by_place = by_code[:, codes[0]]
    later = np.triu(np.ones((8, 8), bool))  # code j at position t, j >= t
    assert np.all(by_place[later] == 0) and np.all(by_place[~later] > 1e-6)
    assert np.all(by_code[:, codes[1]] == 0)  # the other image
    assert np.all(by_class[:, 0] > 1e-6) and np.all(by_class[:, 1:] == 0)


@pytest.mark.parametrize("option", ["plain", "all"])
def test_features_are_what_the_head_reads(option):
    model, prior, params = build(option)
    class_ids, codes = np.array([0, 3], np.int32), integers(5, 16, 2, 8)

    @jax.jit
    def from_features(params):
        x = ar_decoding.features(prior, params, class_ids, codes, model.layers)
        variables = {"params": params}
        condition = prior.apply(variables, class_ids, method="embed_class")
        return prior.apply(variables, x, condition, method="logits")

    whole = full(prior, params, class_ids, codes)
    np.testing.assert_allclose(from_features(params), whole, rtol=0, atol=1e-5)


def test_half_precision_stays_near():
    model, prior, params = build("all")
    class_ids, codes = np.array([0, 3], np.int32), integers(6, 16, 2, 8)
    exact, prior = full(prior, params, class_ids, codes), ar.make(model, jnp.bfloat16)
    for run in (full, cached):
        logits = run(prior, params, class_ids, codes)
        assert logits.dtype == jnp.float32
        assert np.std(logits - exact) < 0.02 * np.std(exact)


# One block.


def block_inputs(adaln, width=32, batch=3, count=5):
    """A stream and what blocks share, for a block of that kind."""
    condition, made = normal(10, batch, 1, width), normal(11, batch, 1, 6 * width)
    rotary = ar.rotary_angles(jnp.arange(count), width // 4)
    shared = ar.Shared(
        rotary, condition if adaln == "full" else None, made if adaln == "shared" else None
    )
    return normal(12, batch, count, width), shared


def torch_block(torch, params, x, shared, heads):
    """The block as the papers have it, by PyTorch's own functions."""
    functional = torch.nn.functional
    batch, count, width = x.shape
    steps = [0.0, 0.0, 1.0] * 2
    if shared.condition is not None:
        made = functional.silu(shared.condition) @ params["modulation"]["kernel"]
        steps = (made + params["modulation"]["bias"]).chunk(6, -1)
    if shared.modulation is not None:
        steps = (shared.modulation.reshape(batch, 1, 6, width) + params["modulation"]).unbind(2)

    def normed(x, name, shift, scale):
        x = functional.rms_norm(x, (width,), params[name]["scale"], 1e-5)
        return x * (1 + scale) + shift

    def attention(x, own):
        joint = (x @ own["qkv"]["kernel"]).reshape(batch, count, -1, width // heads)
        groups = (joint.shape[2] - heads) // 2
        q, k, v = joint.split([heads, groups, groups], 2)
        if "query_norm" in own:
            norms = (own["query_norm"], own["key_norm"])
            q, k = (
                functional.layer_norm(y, y.shape[-1:], norm["scale"], norm["bias"], 1e-5)
                for y, norm in zip((q, k), norms, strict=True)
            )
        q, k = torch_rotate(torch, q), torch_rotate(torch, k)
        k, v = (y.repeat_interleave(heads // groups, 2) for y in (k, v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(x.shape) @ own["out"]["kernel"]

    def mlp(x, own):
        gate, up = (x @ own["gate_up"]["kernel"]).chunk(2, -1)
        return (functional.silu(gate) * up) @ own["down"]["kernel"]

    x = x + steps[2] * attention(normed(x, "norm1", *steps[:2]), params["attention"])
    return x + steps[5] * mlp(normed(x, "norm2", *steps[3:5]), params["mlp"])


def torch_rotate(torch, x):
    """Each pair is a complex number; position t turns pair i by t 10000^(-2i/d)."""
    width = x.shape[-1]
    rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), rates)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).reshape(x.shape)


@pytest.mark.parametrize(
    ("adaln", "kv_heads", "qk_norm"), [("none", 2, False), ("full", 4, True), ("shared", 1, False)]
)
def test_a_block_and_its_gradients_are_torchs(adaln, kv_heads, qk_norm):
    torch = pytest.importorskip("torch")
    block = ar.Block(4, kv_heads, qk_norm, adaln)
    x, shared = block_inputs(adaln)
    params, weights = draw(block, x, jnp.float32(0), shared), normal(13, *x.shape)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def ours(params, x, shared):
        out = block.apply({"params": params}, x, jnp.float32(0), shared)[0]
        return jnp.sum(out * weights), out

    (_, out), grads = ours(params, x, shared)
    leaf = lambda x: torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)  # noqa: E731
    theirs = jax.tree.map(leaf, (params, x, shared))
    expected = torch_block(torch, *theirs, 4)
    (expected * torch.from_numpy(weights)).sum().backward()
    np.testing.assert_allclose(out, expected.detach(), rtol=0, atol=2e-5)
    grads, theirs = ((p, x, s._replace(rotary=None)) for p, x, s in (grads, theirs))
    for own, other in zip(jax.tree.leaves(grads), jax.tree.leaves(theirs), strict=True):
        bound = 2e-5 * float(other.grad.abs().max())
        np.testing.assert_allclose(own, other.grad, rtol=0, atol=bound)


def test_rotation_is_a_complex_product():
    x = normal(14, 2, 6, 3, 10)
    rates = 10000.0 ** (-np.arange(0, 10, 2) / 10)
    positions = np.array([0, 1, 5, 40, 200, 255])
    turns = np.exp(1j * positions[:, None, None] * rates)
    expected = ((x[..., ::2] + 1j * x[..., 1::2]) * turns)[..., None].view(np.float64)
    out = ar.rotate(x, ar.rotary_angles(jnp.asarray(positions), 10))
    np.testing.assert_allclose(out, expected.reshape(x.shape), rtol=0, atol=2e-4)
    np.testing.assert_array_equal(out[:, 0], x[:, 0])  # position 0 stays


def test_rotated_products_depend_on_distance_alone():
    query, key = (np.broadcast_to(normal(seed, 8), (1, 16, 1, 8)) for seed in (15, 16))

    def products(first):
        rotary = ar.rotary_angles(first + jnp.arange(16), 8)
        q, k = (ar.rotate(jnp.asarray(x), rotary)[0, :, 0] for x in (query, key))
        return np.asarray(q @ k.T)

    near = products(0)
    np.testing.assert_allclose(near, products(100), rtol=0, atol=2e-4)
    for distance in range(-15, 16):  # Toeplitz
        assert np.ptp(np.diagonal(near, distance)) < 2e-5
    assert np.std(near[0]) > 0.1


def test_grouped_heads_are_repeated_heads():
    x, width = normal(17, 2, 6, 32), 8
    grouped = draw(ar.Attention(4, 2), x, None)
    q, k, v = np.split(grouped["qkv"]["kernel"], [4 * width, 6 * width], axis=1)
    repeat = lambda y: np.repeat(y.reshape(32, 2, width), 2, axis=1).reshape(32, -1)  # noqa: E731
    kernel = np.concatenate([q, repeat(k), repeat(v)], axis=1)
    repeated = grouped | {"qkv": {"kernel": kernel}}
    out = ar.Attention(4, 2).apply({"params": grouped}, x, None)[0]
    expected = ar.Attention(4, 4).apply({"params": repeated}, x, None)[0]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


# Before training.


@functools.cache
def initial(adaln):
    model = small(adaln, width=64)
    prior = ar.make(model)
    inputs = np.zeros(1, np.int32), np.zeros((1, 8), np.int32)
    return model, prior, jax.jit(prior.init)(jax.random.key(0, impl="rbg"), *inputs)["params"]


def test_first_values():
    _, _, params = initial("shared")
    assert not params["head"]["kernel"].any() and not params["modulation"]["kernel"].any()
    for path in ("attention/qkv", "attention/out", "mlp/gate_up", "mlp/down"):
        outer, inner = path.split("/")
        kernel = params["blocks"][outer][inner]["kernel"]
        assert np.std(kernel) == pytest.approx(0.02, rel=0.05)
        assert not np.array_equal(kernel[0], kernel[1])  # each block has its own
    assert np.std(params["code_embedding"]["embedding"]) == pytest.approx(0.02, rel=0.1)
    for table in (params["positions"], params["blocks"]["modulation"]):
        assert np.std(table) == pytest.approx(64**-0.5, rel=0.1)


def test_full_modulation_starts_as_the_identity():
    """Every gate is 0, so the blocks add nothing at first."""
    model, prior, params = initial("full")
    class_ids, codes = np.array([0, 3], np.int32), integers(7, 16, 2, 8)

    @jax.jit
    def ends(params):
        x, _ = prior.apply({"params": params}, class_ids, codes[:, :-1], method="embed")
        return x, ar_decoding.features(prior, params, class_ids, codes, model.layers)

    np.testing.assert_array_equal(*ends(params))


def test_shared_modulation_starts_from_each_blocks_own():
    """Nothing of the class at first: the block is one whose modulation is a constant."""
    _, prior, params = initial("shared")
    own = jax.tree.map(lambda p: p[1], params["blocks"])
    constant = {"kernel": np.zeros((64, 6 * 64)), "bias": own["modulation"].reshape(-1)}

    @jax.jit
    def both(params, condition, x):
        shared = prior.apply({"params": params}, condition, jnp.arange(5), method="shared")
        given = ar.Shared(None, condition, None)
        ours, full = (ar.Block(4, 4, adaln=kind) for kind in ("shared", "full"))
        return (
            ours.apply({"params": own}, x, jnp.float32(0), shared)[0],
            full.apply({"params": own | {"modulation": constant}}, x, jnp.float32(0), given)[0],
            prior.apply({"params": params}, x, condition, method="logits"),
        )

    params = params | {"head": {"kernel": normal(20, 64, 16)}}
    condition, x = normal(18, 3, 1, 64), normal(19, 3, 5, 64)
    out, expected, logits = both(params, condition, x)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(logits, both(params, -condition, x)[2])


# In training.


def training(dropouts, option="plain", **fields):
    """Logits of a prior in training as a function of parameters, classes, codes and a key."""
    model = small(option, **fields)
    prior = ar.make(model, dropouts=dropouts)

    @jax.jit
    def run(params, class_ids, codes, key):
        return prior.apply({"params": params}, class_ids, codes, rngs={"dropout": key})

    return model, run


def test_classes_are_dropped_for_guidance():
    model, dropouts = small(), NOTHING._replace(condition=0.1)
    params, count = rule_params(model), 4000
    class_ids = integers(21, 3, count)
    made = ar.make(model, dropouts=dropouts).apply(
        {"params": params}, class_ids, method="embed_class", rngs={"dropout": jax.random.key(1)}
    )
    table = params["class_embedding"]["embedding"] + params["positions"][0]
    null = np.all(np.isclose(made[:, 0], table[model.classes], atol=1e-6), -1)
    kept = np.all(np.isclose(made[:, 0], table[class_ids], atol=1e-6), -1)
    assert np.all(null ^ kept)
    share_is(null.mean(), 0.1, count)


def test_the_modulation_drops_the_same_classes():
    """An image without its class is one of the null class, in the sequence and in the norms."""
    model, run = training(NOTHING._replace(condition=0.5), "full")
    params, codes = rule_params(model), np.repeat(integers(22, 16, 1, 8), 64, 0)
    class_ids = np.full(64, 1, np.int32)
    prior = ar.make(model)
    ours = run(params, class_ids, codes, jax.random.key(0))
    own, null = (full(prior, params, np.full(1, i, np.int32), codes[:1]) for i in (1, 3))
    is_own, is_null = (np.abs(ours - x).max((1, 2)) < 1e-5 for x in (own, null))
    assert np.all(is_own ^ is_null) and 10 < is_null.sum() < 54


@pytest.mark.parametrize("kind", ["token", "residual", "condition", "path", "none"])
def test_each_dropout_changes_training_alone(kind):
    dropouts = NOTHING if kind == "none" else NOTHING._replace(**{kind: 0.5})
    model, run = training(dropouts, "shared")
    params, class_ids, codes = rule_params(model), integers(23, 3, 8), integers(24, 16, 8, 8)
    inference = full(ar.make(model), params, class_ids, codes)
    first, again, other = (
        run(params, class_ids, codes, jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    if kind == "none":
        np.testing.assert_allclose(first, inference, rtol=0, atol=1e-5)
    else:
        assert np.abs(first - inference).max() > 0.1 and np.abs(first - other).max() > 0.1


def test_a_share_of_the_embedded_features_is_dropped():
    """Of the sequence, not of the condition."""
    model = small("full")
    params, prior = rule_params(model), ar.make(model, dropouts=NOTHING._replace(token=0.1))
    ids, codes = integers(25, 3, 64), integers(26, 16, 64, 8)
    embed = functools.partial(prior.apply, {"params": params}, ids, codes[:, :-1], method="embed")
    x, condition = embed(rngs={"dropout": jax.random.key(0)})
    given = ar.make(model).apply({"params": params}, ids, codes[:, :-1], method="embed")
    dropped = np.asarray(x) == 0
    np.testing.assert_allclose(x, np.where(dropped, 0, given[0] / 0.9), rtol=1e-5)
    np.testing.assert_array_equal(condition, given[1])
    share_is(dropped.mean(), 0.1, dropped.size)


def branch_in_training(dropouts, rate=0.0, batch=400):
    """What attention adds to the stream, in inference and in training; the MLP is silent."""
    x, shared = block_inputs("none", batch=batch)
    block, kept = ar.Block(4, 4), ar.Block(4, 4, dropouts=dropouts)
    params = draw(block, x, jnp.float32(0), shared)
    params["mlp"]["down"]["kernel"] *= 0

    @jax.jit
    def added(rate, rng):
        plain = block.apply({"params": params}, x, rate, shared)[0]
        return plain - x, kept.apply({"params": params}, x, rate, shared, rngs={"dropout": rng})[
            0
        ] - x

    return added(jnp.float32(rate), jax.random.key(3))


def test_a_share_of_a_branchs_features_is_dropped():
    plain, ours = branch_in_training(NOTHING._replace(residual=0.1))
    dropped = np.asarray(ours) == 0
    np.testing.assert_allclose(ours, np.where(dropped, 0, plain / 0.9), rtol=0, atol=1e-5)
    share_is(dropped.mean(), 0.1, dropped.size)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_stochastic_depth_drops_whole_examples(rate):
    """The others grow, so that the mean stays; dropout of features is then off."""
    plain, ours = branch_in_training(ar.Dropouts(path=0.3), rate)
    dropped = np.all(np.asarray(ours) == 0, (1, 2), keepdims=True)
    expected = np.where(dropped, 0, plain / np.float32(1 - rate))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    share_is(dropped.mean(), rate, len(dropped))


def test_stochastic_depth_grows_with_depth():
    """Of one block after the other, with all else silent."""
    model, run = training(NOTHING._replace(path=0.4), layers=3, tokens=2)
    params, codes = rule_params(model), np.repeat(integers(27, 16, 1, 2), 400, 0)
    blocks = params["blocks"]
    blocks["mlp"]["down"]["kernel"] *= 0
    kernel = blocks["attention"]["out"]["kernel"].copy()

    def logits(block):
        blocks["attention"]["out"]["kernel"] = kernel * (np.arange(3) == block)[:, None, None]
        return np.asarray(run(params, np.zeros(400, np.int32), codes, jax.random.key(5)))

    for block, rate in enumerate((0.0, 0.2, 0.4)):
        dropped = np.abs(logits(block) - logits(None)).max((1, 2)) < 1e-5
        assert abs(dropped.mean() - rate) < 0.08


def test_what_is_recomputed_or_unrolled_does_not_change_gradients():
    """With dropout too: the same features are dropped again."""
    model = small()
    params, class_ids, codes = rule_params(model), integers(28, 3, 2), integers(29, 16, 2, 8)
    weights = normal(30, 2, 8, 16)

    def grads(loop):
        prior = ar.make(model, loop=loop, dropouts=ar.Dropouts())

        def objective(params, key):
            logits = prior.apply({"params": params}, class_ids, codes, rngs={"dropout": key})
            return jnp.sum(logits * weights)

        return jax.jit(jax.grad(objective))(params, jax.random.key(0, impl="rbg"))

    expected = jax.tree.leaves(grads(layers.SCANNED))
    for loop in (layers.Loop("dots"), layers.Loop("blocks"), layers.Loop(unroll=("cpu",))):
        for ours, theirs in zip(jax.tree.leaves(grads(loop)), expected, strict=True):
            bound = 1e-5 * np.abs(theirs).max() + 1e-6
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound, err_msg=str(loop))


def test_cross_entropy_and_its_gradient():
    logits, codes = 5 * normal(31, 2, 8, 16), integers(32, 16, 2, 8)
    weights = normal(33, 2, 8)
    plain = optax.softmax_cross_entropy_with_integer_labels

    def slopes(losses):
        return jax.grad(lambda logits: jnp.sum(losses(logits, codes) * weights))(logits)

    np.testing.assert_allclose(
        losses.cross_entropy(logits, codes), plain(logits, codes), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(slopes(losses.cross_entropy), slopes(plain), rtol=1e-5, atol=1e-7)


def test_gradients_of_the_head_in_half_precision():
    """Logits are exact sums, and their gradient is rounded once before it is multiplied."""
    model = small(vocab=64)
    prior = ar.make(model, jnp.bfloat16)
    x, given = jnp.bfloat16(normal(34, 2, 8, 32)), normal(35, 2, 8, 64)
    kernel = np.float32(jnp.bfloat16(normal(36, 32, 64)))
    params = rule_params(model) | {"head": {"kernel": kernel}}

    def head(params, x):
        return prior.apply({"params": params}, x, method=lambda prior, x: prior.head(x))

    logits, pull = jax.vjp(jax.jit(head), params, x)
    np.testing.assert_allclose(logits, np.float32(x) @ kernel, rtol=1e-5, atol=1e-5)
    by_params, by_x = pull(jnp.asarray(given))
    given = np.float32(jnp.bfloat16(given))
    by_kernel = np.einsum("bnc,bnv->cv", np.float32(x), given)
    np.testing.assert_allclose(by_params["head"]["kernel"], by_kernel, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(np.float32(by_x), given @ kernel.T, rtol=2**-8, atol=1e-5)


def test_gradients_of_a_row_add_up_in_float32():
    """In bfloat16 a sum of ones stays at 256."""
    model = small(vocab=64, tokens=400)
    prior = ar.make(model, jnp.bfloat16)
    codes = np.full((2, 400), 5, np.int32)

    @jax.jit
    @jax.grad
    def counts(params):
        x, _ = prior.apply({"params": params}, codes[:, 0] % 3, codes[:, 1:], method="embed")
        return x.astype(jnp.float32).sum()

    rows = counts(rule_params(model))["code_embedding"]["embedding"]
    np.testing.assert_array_equal(rows[5], 2 * 399)


# Configs.

REFUSED = {
    "width is 768, expected a multiple of the 7 heads": {"heads": 7},
    "kv_heads is 5, expected a divisor of the 12 heads": {"kv_heads": 5},
    "kv_heads is 24, expected a divisor of the 12 heads": {"kv_heads": 24},
    "a head is 3 wide": {"heads": 12, "width": 36, "rope": True},
    "adaln is 'zero', expected one of": {"adaln": "zero"},
    "layers is 0, expected at least 1": {"layers": 0},
    "classes is -1, expected at least 1": {"classes": -1},
    "width is 'wide', expected a value of int": {"width": "wide"},
    "no field 'depth'": {"depth": 12},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_prior_that_cannot_be_built_is_refused(message):
    with pytest.raises(ConfigError, match=message) as refused:
        model_config("prior-B", **REFUSED[message])
    assert "\n" not in str(refused.value)


def test_a_dry_run_shows_a_priors_parameters():
    config = ml_collections.ConfigDict({"name": "ar", "model": model_config("prior-B")})
    text = parameters.report(config)
    assert "blocks/mlp/gate_up/kernel" in text and "(12, 768, 4096)" in text
    assert "111,085,824" in text and "alignment" not in text
    config.model.heads = 16  # as a command line sets it
    with pytest.raises(ConfigError, match="kv_heads is 12, expected a divisor of the 16 heads"):
        parameters.report(config)
