"""One update of both networks: accumulation, phases, precision, and what each part may touch."""

import functools
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tiny

from gigatok_jax.model_config import model_config
from gigatok_jax.models import dino, discriminator
from gigatok_jax.train import objective, optim, tokenizer_step
from gigatok_jax.train import tokenizer as loop
from gigatok_jax.train.objective import Phase
from gigatok_jax.weights import tokenizer_names

ALL_ON = Phase(shortcut=True, adversarial=True, entropy=True)
PLAIN = Phase(shortcut=True, adversarial=True, entropy=False)  # with a judge without batch norm
EARLY = Phase(shortcut=True, adversarial=False, entropy=True)
LATE = Phase(shortcut=False, adversarial=True, entropy=False)


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def gradients(parts, config, images, phase, groups=1, micro_batches=1):
    """Gradients of the first state, on the host."""
    run = jax.jit(
        lambda s, x: tokenizer_step.gradients(s, x, {}, phase, parts, config, groups, micro_batches)
    )
    return jax.device_get(run(tiny.first_state(parts, config), images))


def assert_close(ours, expected, tolerance=2e-5):
    """Largest difference relative to the largest value of each array.

    Where addends cancel, the rounding is theirs: hence the share of the largest value of all.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    largest = max(np.abs(y).max() for y in jax.tree.leaves(expected))
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(expected), strict=True
    ):
        bound = tolerance * np.abs(y).max() + 1e-6 * largest
        np.testing.assert_allclose(x, y, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


def interleaved(images, k):
    """Examples of micro-batch 0, then those of micro-batch 1, ...: consecutive groups."""
    return np.concatenate([images[j::k] for j in range(k)])


@functools.cache
def accumulated():
    """Config, images and gradients of a batch cut into four micro-batches, every loss on."""
    config, images = tiny.config(), tiny.images(8)
    return config, images, gradients(tiny.networks(), config, images, ALL_ON, micro_batches=4)


def test_micro_batches_with_local_statistics_are_devices():
    config, images, ours = accumulated()
    expected = gradients(tiny.networks(4), config, interleaved(images, 4), ALL_ON, groups=4)
    assert_close(ours.scalars, expected.scalars)
    assert_close(ours.generator, expected.generator)
    assert_close(ours.discriminator, expected.discriminator)
    assert_close(ours.stats, expected.stats)  # those of the first
    np.testing.assert_array_equal(ours.codes, expected.codes)
    assert_close(ours.latents, expected.latents)


def test_micro_batches_are_the_mean_of_separate_batches():
    config, images, ours = accumulated()
    parts, key = tiny.networks(), jax.random.key(0)  # PatchGAN draws nothing
    first = tiny.first_state(parts, config)

    @jax.jit
    def separate(images):
        pixels = images.astype(jnp.float32) / 127.5 - 1
        fields = {"networks": parts, "loss": config.loss}
        (loss, made), generator = jax.value_and_grad(objective.generator, has_aux=True)(
            first.params, first.discriminator, first.discriminator_stats, {}, pixels, key,
            phase=ALL_ON, groups=1, **fields,
        )  # fmt: skip
        (other, _), judge = jax.value_and_grad(objective.discriminator, has_aux=True)(
            first.discriminator, made.stats, {}, pixels, made.fakes, key, **fields
        )
        return loss, other, generator, judge

    parts_of_it = [jax.device_get(separate(images[j::4])) for j in range(4)]
    loss, other, generator, judge = jax.tree.map(lambda *x: np.mean(x, axis=0), *parts_of_it)
    assert_close((ours.generator, ours.discriminator), (generator, judge))
    assert_close((ours.scalars["loss"], ours.scalars["discriminator_loss"]), (loss, other))


def test_terms_without_batch_statistics_do_not_see_the_cut():
    config, parts, images = tiny.config(), tiny.networks(judge=tiny.PlainJudge()), tiny.images(8)
    whole = gradients(parts, config, images, PLAIN)
    cut = gradients(parts, config, images, PLAIN, micro_batches=4)
    assert {"reconstruction", "codebook", "feature", "shortcut_adversarial"} <= set(whole.scalars)
    assert_close(cut.scalars, whole.scalars)
    assert_close((cut.generator, cut.discriminator), (whole.generator, whole.discriminator))


def test_the_total_is_the_sum_of_the_terms():
    scalars = accumulated()[2].scalars
    judge = ("discriminator", "shortcut_discriminator")
    assert scalars["discriminator_loss"] == pytest.approx(
        sum(scalars[name] for name in judge), rel=1e-6
    )
    other = {"loss", "discriminator_loss", "logits_real", "logits_fake", *judge}
    total = sum(value for name, value in scalars.items() if name not in other)
    assert scalars["loss"] == pytest.approx(total, rel=1e-6)


# One program per phase serves all the tests below.


class Compiled:
    """A step whose rates are zero where the step number says so."""

    def __init__(self):
        self.config = tiny.config(discriminator_start=1)
        self.parts = tiny.networks()
        rates = (
            lambda s: jnp.where(s == 7, 0.0, 1e-3),  # the generator rests at step 7
            lambda s: jnp.where(s == 8, 0.0, 1e-3),
        )
        self.optimizers = tiny.optimizers(self.config, *rates)
        self.step = tokenizer_step.make(self.parts, self.optimizers, self.config, groups=1)
        self.phases = set()

    def first(self, at=0):
        first = tiny.first_state(self.parts, self.config)
        return first.replace(step=jnp.int32(at))

    def __call__(self, before, phase=ALL_ON, images=None):
        """The state before on the host, the state after, and the scalars."""
        self.phases.add(phase)
        host = jax.device_get(before.replace(rng=jax.random.key_data(before.rng)))
        after, scalars = self.step(before, tiny.images() if images is None else images, {}, phase)
        return host, after, jax.device_get(scalars)


@pytest.fixture(scope="module")
def compiled():
    return Compiled()


def same(a, b) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_the_state_is_donated_and_counted(compiled):
    first = compiled.first()
    leaves = [*jax.tree.leaves(first.params), *jax.tree.leaves(first.opt_state), first.step]
    after, _ = compiled.step(first, tiny.images(), {}, ALL_ON)
    compiled.phases.add(ALL_ON)
    assert all(leaf.is_deleted() for leaf in leaves)
    assert int(after.step) == 1


def test_one_network_learns_while_the_other_rests(compiled):
    before, after, _ = compiled(compiled.first(at=7))
    assert same(before.params, after.params)
    assert not same(before.discriminator, after.discriminator)
    before, after, _ = compiled(compiled.first(at=8))
    assert same(before.discriminator, after.discriminator)
    assert not same(before.params, after.params)


def test_the_discriminator_waits_for_its_start(compiled):
    before, after, scalars = compiled(compiled.first(), EARLY)
    for name in ("discriminator", "discriminator_stats", "discriminator_opt_state"):
        assert same(getattr(before, name), getattr(after, name)), name
    assert not same(before.params, after.params)
    assert not any("discriminator" in name or "adversarial" in name for name in scalars)


def test_each_phase_is_compiled_once(compiled):
    current = compiled.first()
    for phase in (EARLY, EARLY, ALL_ON, ALL_ON, LATE, LATE, EARLY):
        _, current, _ = compiled(current, phase)
    assert compiled.step._cache_size() == len(compiled.phases)


def test_the_average_follows_the_new_parameters(compiled):
    before, after, _ = compiled(compiled.first(at=3))
    decay = compiled.config.optim.ema
    expected = jax.tree.map(
        lambda e, p: decay * e + (1 - decay) * p, before.ema_params, after.params
    )
    assert_close(jax.device_get(after.ema_params), jax.device_get(expected), 1e-6)


def test_scalars_say_what_was_done(compiled):
    _, after, scalars = compiled(compiled.first(at=3))
    assert scalars["learning_rate"] == pytest.approx(1e-3)
    used = np.asarray(after.codebook_used).astype(int)
    counts = np.bincount(used, minlength=tiny.ROWS)
    assert scalars["codebook_usage"] == pytest.approx(np.mean(counts > 0))
    assert scalars["codebook_dead"] == np.sum(counts == 0)
    share = counts[counts > 0] / counts.sum()
    assert scalars["codebook_perplexity"] == pytest.approx(
        np.exp(-np.sum(share * np.log(share))), rel=1e-5
    )
    assert all(np.isfinite(value) for value in scalars.values())
    assert all(value.dtype == np.float32 for value in scalars.values())


def test_the_history_of_codes_moves_on(compiled):
    before, after, _ = compiled(compiled.first())
    new = tiny.images().shape[0] * (tiny.SIZE // tiny.PATCH) ** 2
    np.testing.assert_array_equal(after.codebook_used[:-new], before.codebook_used[new:])
    assert np.unique(after.codebook_used[-new:]).size > 1


def test_half_precision_keeps_float32_state_and_losses(compiled):
    config = compiled.config
    half = tiny.networks(dtype=jnp.bfloat16)
    made = tokenizer_step.make(half, tiny.optimizers(config), config, groups=1)
    after, scalars = made(tiny.first_state(half, config), tiny.images(), {}, LATE)
    for tree in (after.params, after.ema_params, after.discriminator, after.discriminator_stats):
        kinds = {leaf.dtype for leaf in jax.tree.leaves(tree)}
        assert kinds <= {jnp.dtype("float32"), jnp.dtype("int32")}
    moments = jax.tree.leaves((after.opt_state, after.discriminator_opt_state))
    assert {leaf.dtype for leaf in moments} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert {value.dtype for value in scalars.values()} == {jnp.dtype("float32")}
    _, _, full = compiled(compiled.first(), LATE)
    for name in ("reconstruction", "discriminator_loss"):
        assert scalars[name] == pytest.approx(full[name], rel=2e-2), name


# Phases and rates.


@pytest.mark.parametrize(
    "name, boundary, before, after",
    [
        ("shortcut", {"shortcut_end": 10}, True, False),  # while global_step < aux_loss_end
        ("adversarial", {"discriminator_start": 10}, False, True),  # from global_step >= start
    ],
)
def test_phases_change_at_the_originals_steps(name, boundary, before, after):
    config = tiny.config(**boundary)
    phases = [
        getattr(objective.phase_at(done, config.loss, config.codebook), name) for done in range(12)
    ]
    # The original's global_step is 10 when 9 updates are done.
    assert phases == [before] * 9 + [after] * 3


def test_phases_that_never_come_or_never_end():
    config = tiny.config(shortcut_end=0, discriminator="none", discriminator_start=0)
    assert objective.phase_at(0, config.loss, config.codebook) == Phase(False, False, True, True)
    config.loss.entropy, config.codebook.warmup_steps = 0.0, 3
    phases = [objective.phase_at(done, config.loss, config.codebook) for done in (2, 3)]
    assert [(p.entropy, p.quantize) for p in phases] == [(False, False), (False, True)]


def test_the_first_rates_are_whole_under_warm_up():
    config = tiny.config(discriminator_start=5)
    config.optim.update(warmup_steps=10, discriminator_learning_rate=5e-4)
    rates = loop.make_optimizers(config)
    warm = lambda done, base: base * (done / 10 + (1 - done / 10) * 0.01)  # noqa: E731
    assert float(rates.rate(jnp.int32(0))) == pytest.approx(1e-3)
    assert float(rates.rate(jnp.int32(1))) == pytest.approx(warm(0, 1e-3))
    # Its first update is the one after 4, with global_step 5 of the original.
    assert float(rates.discriminator_rate(jnp.int32(4))) == pytest.approx(5e-4)
    assert float(rates.discriminator_rate(jnp.int32(5))) == pytest.approx(warm(4, 5e-4))


# Terms.


@pytest.mark.parametrize("kind", ["hinge", "vanilla", "non_saturating"])
def test_adversarial_losses_can_be_chosen(kind):
    config = tiny.config(adversarial_type=kind)
    parts = tiny.networks(judge=tiny.PlainJudge())
    first = tiny.first_state(parts, config)
    pixels = tokenizer_step.to_pixels(jnp.asarray(tiny.images(2)))
    key = jax.random.key(0)
    fields = {"networks": parts, "loss": config.loss}
    phase = LATE._replace(quantize=False)
    arguments = (first.params, first.discriminator, {}, {}, pixels, key)
    _, made = objective.generator(*arguments, phase=phase, groups=1, **fields)
    _, judged = objective.discriminator(
        first.discriminator, {}, {}, pixels, made.fakes, key, **fields
    )
    judge = lambda x: np.float64(  # noqa: E731
        parts.discriminator.apply({"params": first.discriminator}, x, train=True)
    )
    real, fake = judge(pixels), judge(made.fakes.images)
    log_d = lambda x: -np.log1p(np.exp(-x))  # log of the sigmoid  # noqa: E731
    generator = {
        "hinge": -fake.mean(),
        "vanilla": log_d(-fake).mean(),
        "non_saturating": -log_d(fake).mean(),
    }[kind]
    other = -log_d(real).mean() - log_d(-fake).mean()
    if kind == "hinge":
        other = np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()
    assert made.terms["adversarial"] == pytest.approx(0.5 * generator, rel=1e-4)
    assert judged.terms["discriminator"] == pytest.approx(0.5 * 0.5 * other, rel=1e-4)


def test_warm_up_decodes_what_is_not_quantized():
    """Off, the quantizer is out of the way: no term reaches the codebook."""
    config, parts = tiny.config(), tiny.networks()
    phase = Phase(shortcut=False, adversarial=False, entropy=True, quantize=False)
    out = gradients(parts, config, tiny.images(4), phase)
    assert set(out.scalars) == {"loss", "reconstruction"}
    np.testing.assert_array_equal(out.generator["quantizer"]["codebook"], 0)
    assert np.abs(out.generator["pre_quant"]["kernel"]).max() > 0


class TinyDino(discriminator.DinoDiscriminator):
    """The real discriminator over a trunk of one block."""

    width: int = 16
    heads: int = 2
    depth: int = 1
    taps: tuple[int, ...] = (0,)
    size: int = 32
    kernel: int = 3


def test_the_dino_discriminator_learns_and_its_trunk_does_not():
    config = tiny.config(discriminator="dino", discriminator_start=1)
    parts = tiny.networks(judge=TinyDino())
    first = tiny.first_state(parts, config)
    trunk = dino.DINO(16, 2, 1, (0,)).init(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))["params"]
    frozen = {"dino": jax.tree.map(jnp.asarray, trunk)}
    made = tokenizer_step.make(parts, tiny.optimizers(config), config, groups=1)
    before = jax.device_get(first.discriminator)
    after, scalars = made(first, tiny.images(2), frozen, LATE)
    assert all(np.isfinite(value) for value in scalars.values())
    assert not same(before, after.discriminator)
    assert set(after.discriminator) == {"head_0", "head_1"}  # the trunk is not in the state
    assert not jax.tree.leaves(frozen)[0].is_deleted()


def test_the_dino_discriminator_sees_the_reconstruction_twice():
    fakes = objective.Fakes(jnp.zeros(1), jnp.ones(1))
    of = lambda kind: objective._second_fake(fakes, types.SimpleNamespace(discriminator=kind))  # noqa: E731
    assert of("dino") is fakes.images
    assert of("patchgan") is fakes.shortcut
    assert objective._second_fake(fakes._replace(shortcut=None), None) is None


# The codebook's cures.


def cure(**values):
    off = {"data_init": False, "reset_every": 0, "warmup_steps": 0}
    return ml_collections.ConfigDict(off | values)


def revived(done, used, latents, values):
    """Codebooks before and after the cure that ends update `done`."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(8, 4)).astype(np.float32)
    params = {"quantizer": {"codebook": jnp.asarray(table)}, "other": jnp.ones(2)}
    before = types.SimpleNamespace(
        params=params, ema_params=params, step=jnp.int32(done - 1), rng=jax.random.key(0),
        codebook_used=jnp.asarray(used, jnp.float32),
    )  # fmt: skip
    before.replace = lambda **new: types.SimpleNamespace(**{**vars(before), **new})
    after = tokenizer_step._revive_codebook(before, jnp.asarray(latents), cure(**values))
    assert after.params["other"] is params["other"]
    return table, *(
        np.asarray(x["quantizer"]["codebook"]) for x in (after.params, after.ema_params)
    )


LATENTS = np.random.default_rng(1).normal(size=(3, 5, 4)).astype(np.float32)


def is_latent(rows) -> np.ndarray:
    return (rows[:, None] == LATENTS.reshape(-1, 4)).all(-1).any(-1)


@pytest.mark.parametrize("warmup, done", [(0, 1), (3, 3)])
def test_the_codebook_starts_as_latents_when_quantization_begins(warmup, done):
    values = {"data_init": True, "warmup_steps": warmup}
    _, rows, average = revived(done, np.arange(8), LATENTS, values)
    assert is_latent(rows).all()
    np.testing.assert_array_equal(rows, average)
    table, rows, _ = revived(done + 1, np.arange(8), LATENTS, values)
    np.testing.assert_array_equal(rows, table)


def test_rows_that_nobody_chose_start_again():
    values = {"reset_every": 10, "warmup_steps": 5}
    used = [0, 0, 2, 5, 7]
    table, rows, average = revived(20, used, LATENTS, values)
    dead = np.isin(np.arange(8), used, invert=True)
    np.testing.assert_array_equal(is_latent(rows), dead)
    np.testing.assert_array_equal(rows[~dead], table[~dead])
    np.testing.assert_array_equal(rows, average)
    assert len(np.unique(rows[dead], axis=0)) > 1


@pytest.mark.parametrize("done, warmup", [(19, 5), (10, 10)])  # not its turn; still warming up
def test_rows_are_left_alone_between_resets(done, warmup):
    values = {"reset_every": 10, "warmup_steps": warmup}
    table, rows, _ = revived(done, [0], LATENTS, values)
    np.testing.assert_array_equal(rows, table)


def test_published_recipes_never_touch_the_codebook():
    first = object()
    assert tokenizer_step._revive_codebook(first, None, cure()) is first


def test_decay_follows_the_mask_and_the_schedule_reaches_the_update():
    """The rate that is logged is the rate that moved the parameters."""
    config = tiny.config()
    config.optim.update(weight_decay=0.5, clip=1e9)
    optimizer = optim.make_optimizer(config.optim)
    params = {"w": jnp.ones(3)}
    out = optim.apply(optimizer, {"w": jnp.zeros(3)}, optimizer.init(params), params, 0.1)
    np.testing.assert_allclose(out.params["w"], 1 - 0.1 * 0.5, rtol=1e-6)


@pytest.mark.parametrize("size", ["S-S", "XL-XXL", "B-L-2D", "S-S-2D"])
def test_decay_spares_what_the_original_calls_norm(size):
    names = {e.path: e.name for e in tokenizer_names.entries(model_config(size))}
    for path, name in names.items():
        assert loop.is_decayed(path) == ("norm" not in name), (path, name)
