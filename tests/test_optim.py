import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import rule

from gigatok_jax.errors import CheckpointError, ConfigError
from gigatok_jax.run import checkpoint
from gigatok_jax.run import workdir as workdir_lib
from gigatok_jax.train import optim

GOLDEN = rule.golden_path("lr_schedules.npz")
SETTINGS = ("s0", "s1", "s2")
BFLOAT16 = {"first_moment": "bfloat16"}


def optim_config(**changes):
    config = ml_collections.ConfigDict(
        {
            "learning_rate": 1e-3,
            "end_learning_rate": 1e-5,
            "schedule": "cosine",
            "warmup_steps": 0,
            "warmup_epochs": 0.0,
            "wsd_decay_fraction": 0.2,
            "beta1": 0.9,
            "beta2": 0.95,
            "first_moment": "float32",
            "weight_decay": 0.1,
            "decay_mask": "all",
            "clip": 1.0,
        }
    )
    config.update(changes)
    return config


def wsd(decay, fraction=0.2, final=0.0):
    def schedule(step, base, warmup, total):
        return optim.wsd(step, base, warmup, total, int(fraction * total), decay, final)

    return schedule


SCHEDULES = {
    "const_lr": lambda step, base, warmup, total: optim.constant(step, base, warmup),
    "cosine_lr": optim.cosine,
    "cosine_v2_end0": optim.cosine,
    "cosine_v2_end1e-5": lambda *args: optim.cosine(*args, end=1e-5),
    "const_cooldown_40_pow1": lambda *args: optim.wsd(*args, 40, "linear"),
    "wsd_sqrt_f0.4_final0.05": wsd("sqrt", 0.4, 0.05),
    **{f"wsd_{decay}_f0.2": wsd(decay) for decay in ("sqrt", "linear", "cosine", "square")},
}


def golden(setting, name):
    stored = np.load(GOLDEN)
    values = json.loads(str(stored["meta"]))[setting]
    return stored[f"{setting}_{name}_64"], (values["base_lr"], values["warmup"], values["steps"])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_the_originals(name, setting):
    expected, arguments = golden(setting, name)
    steps = np.arange(len(expected))
    rates = SCHEDULES[name](steps, *arguments)
    np.testing.assert_allclose(rates, expected, rtol=1e-10, atol=1e-20)
    traced = jax.jit(lambda step: SCHEDULES[name](step, *arguments))(jnp.arange(len(expected)))
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-6 * arguments[0])


@pytest.mark.parametrize("setting", SETTINGS)
def test_exponential_decay_is_the_originals_times_base(setting):
    expected, (base, warmup, total) = golden(setting, "wsd_exp_f0.2")
    decaying = np.arange(len(expected)) >= total - int(0.2 * total)
    rates = wsd("exp", final=0.1)(np.arange(len(expected)), base, warmup, total)
    expected = np.where(decaying, base * expected, expected)
    np.testing.assert_allclose(rates, expected, rtol=1e-10)


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
@pytest.mark.parametrize("first", [0, 25])  # the generator; a discriminator that starts late
def test_rate_of_an_update_was_set_after_the_update_before(schedule, first):
    config = optim_config(schedule=schedule, warmup_epochs=0.5)
    shapes = {
        "constant": lambda step: optim.constant(step, 1e-3, 10),
        "cosine": lambda step: optim.cosine(step, 1e-3, 10, 80, 1e-5),
        "wsd": lambda step: optim.wsd(step, 1e-3, 10, 80, 16),
    }
    rate = optim.learning_rate(config, 80, steps_per_epoch=20, first_step=first)
    current = 1e-3  # what the optimizer was built with
    for step in range(first, 80):
        assert rate(step) == pytest.approx(float(current), rel=1e-12)
        current = shapes[schedule](step)


def test_rate_is_traceable_and_has_its_own_base():
    rate = optim.learning_rate(optim_config(warmup_steps=4), 50, 10, base=2e-3)
    steps = np.arange(50)
    np.testing.assert_allclose(jax.jit(jax.vmap(rate))(jnp.arange(50)), rate(steps), rtol=1e-5)
    assert rate(0) == 2e-3 and rate(5) == 2e-3 and rate(1) == pytest.approx(2e-5)


def parameters(rng):
    shapes = {"block": {"kernel": (3, 4, 5), "norm_scale": (3, 4)}, "bias": (7,)}

    def leaf(shape):
        return rng.normal(size=shape).astype(np.float32)

    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def run_torch(params, gradients, rates, groups):
    """PyTorch's AdamW and clipping; `groups` are weight decays, one for each leaf."""
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(p).requires_grad_() for p in jax.tree.leaves(params)]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": w} for p, w in zip(leaves, groups, strict=True)],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    norms = []
    for grads, rate in zip(gradients, rates, strict=True):
        for leaf, grad in zip(leaves, jax.tree.leaves(grads), strict=True):
            leaf.grad = torch.tensor(grad)
        norms.append(torch.nn.utils.clip_grad_norm_(leaves, 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return [leaf.detach().numpy() for leaf in leaves], norms


def length(tree):
    """Euclidean norm of all leaves together, in float64."""
    return np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize("mask", optim.DECAY_MASKS)
def test_optimizer_is_torchs(mask):
    rng = np.random.default_rng(0)
    params = parameters(rng)
    # Scales on both sides of the clip, and one that makes epsilon matter.
    gradients = [
        jax.tree.map(lambda g, s=scale: g * np.float32(s), parameters(rng))
        for scale in (1.0, 1e-2, 30.0, 1e-8, 0.1)
    ]
    rates = [1e-3, 1e-5, 2e-2, 1e-3, 5e-3]
    decays = {"no_norm": lambda path: "norm" not in path, "matrices": lambda path: "kernel" in path}
    weight_decays = {"all": [0.1] * 3, "no_norm": [0.1, 0.1, 0.0], "matrices": [0.0, 0.1, 0.0]}
    expected, norms = run_torch(params, gradients, rates, weight_decays[mask])

    optimizer = optim.make_optimizer(optim_config(decay_mask=mask), decays.get(mask))
    state = optimizer.init(params)
    update = jax.jit(lambda *args: optim.apply(optimizer, *args))
    for grads, rate, norm in zip(gradients, rates, norms, strict=True):
        before = params
        params, state, norms = update(grads, state, params, jnp.float32(rate))
        np.testing.assert_allclose(norms["gradient_norm"], norm, rtol=1e-6)
        np.testing.assert_allclose(norms["parameter_norm"], length(params), rtol=1e-6)
        moved = jax.tree.map(lambda new, old: np.float64(new) - np.float64(old), params, before)
        # The difference of rounded parameters is known to their last digit alone.
        np.testing.assert_allclose(norms["update_norm"], length(moved), rtol=2e-3, atol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(params), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-7)


def test_first_moment_may_be_bfloat16():
    """Each update computes it in float32 of the one that is kept, and rounds it last."""
    rng = np.random.default_rng(1)
    params, gradients = parameters(rng), [parameters(rng) for _ in range(4)]
    full, short = (optim.make_optimizer(optim_config(**change)) for change in ({}, BFLOAT16))
    ours, expected = ((params, one.init(params)) for one in (short, full))
    for i, grads in enumerate(gradients):
        before = ours[1][1].mu
        ours, expected = (
            jax.jit(optim.apply, static_argnums=0)(one, grads, state, start, 1e-2)[:2]
            for one, (start, state) in ((short, ours), (full, expected))
        )
        clip = 1 / np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
        for mu, old, grad in zip(
            *map(jax.tree.leaves, (ours[1][1].mu, before, grads)), strict=True
        ):
            made = 0.9 * np.asarray(old, np.float32) + 0.1 * np.float32(clip) * grad
            assert mu.dtype == jnp.bfloat16
            np.testing.assert_allclose(mu.astype(np.float32), made, rtol=2**-8, atol=0)
        # A moment is off by 2^-9 of itself at each update, a direction by little more.
        for x, y in zip(*map(jax.tree.leaves, (ours[0], expected[0])), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6 if i == 0 else 1e-4)


def test_a_checkpoint_keeps_the_type_of_its_first_moment(tmp_path):
    full, short = (
        {"opt_state": optim.make_optimizer(optim_config(**change)).init({"w": jnp.ones(3)})}
        for change in ({}, BFLOAT16)
    )
    saver = checkpoint.Checkpoints(tmp_path)
    saver.save(1, short, {})
    saver.wait()
    restored, _ = saver.restore(jax.eval_shape(lambda: short), 1)
    assert restored["opt_state"][1].mu["w"].dtype == jnp.bfloat16
    assert restored["opt_state"][1].nu["w"].dtype == jnp.float32
    with pytest.raises(CheckpointError, match="first_moment has to stay as it was") as refused:
        saver.restore(jax.eval_shape(lambda: full), 1)
    assert "\n" not in str(refused.value)
    saver.close()
    workdir_lib.check_workdir(tmp_path, {"optim": optim_config().to_dict()})
    with pytest.raises(ConfigError, match=r"optim\.first_moment is .bfloat16. here"):
        workdir_lib.check_workdir(tmp_path, {"optim": optim_config(**BFLOAT16).to_dict()})


def test_ema_is_the_weighted_mean_of_all_parameters_seen():
    rng = np.random.default_rng(2)
    history = [rng.normal(size=5) for _ in range(6)]
    ema = {"w": jnp.asarray(history[0], jnp.float32)}
    for params in history[1:]:
        ema = optim.update_ema(ema, {"w": jnp.asarray(params, jnp.float32)}, 0.9)
    weights = [0.9**5] + [0.1 * 0.9 ** (5 - k) for k in range(1, 6)]
    expected = sum(w * params for w, params in zip(weights, history, strict=True))
    np.testing.assert_allclose(ema["w"], expected, rtol=1e-5, atol=1e-6)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match=r"optim\.schedule is 'linear', expected one of cosine"):
        optim.learning_rate(optim_config(schedule="linear"), 10, 5)
    with pytest.raises(ConfigError, match="both set"):
        optim.learning_rate(optim_config(warmup_steps=5, warmup_epochs=1.0), 10, 5)
    with pytest.raises(ConfigError, match=r"optim\.decay_mask is 'some', expected one of all"):
        optim.make_optimizer(optim_config(decay_mask="some"))
    with pytest.raises(ConfigError, match="needs a rule"):
        optim.make_optimizer(optim_config(decay_mask="no_norm"))
    with pytest.raises(ConfigError, match="positive"):
        optim.make_optimizer(optim_config(clip=0.0))
    with pytest.raises(ConfigError, match="first_moment is 'float16', expected one of float32"):
        optim.make_optimizer(optim_config(first_moment="float16"))
