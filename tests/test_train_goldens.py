"""Losses, gradients and updates of both networks equal the original's, on block images.

One compiled program gives the gradients of every case: the adversarial weight is its argument, so
that 0 is the time before the discriminator starts.
"""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule
from test_tokenizer_goldens import model_of, rule_params

from configs import common
from gigatok_jax import trees
from gigatok_jax.models import discriminator, perceptual, tokenizer
from gigatok_jax.train import networks as networks_lib
from gigatok_jax.train import objective, optim, tokenizer_step
from gigatok_jax.weights import discriminator_names as convert_discriminator
from gigatok_jax.weights import frozen_names, names, tokenizer_names

pytestmark = pytest.mark.slow  # nine minutes of compiling and float32 on two slow cores

ALL_ON = objective.Phase(shortcut=True, adversarial=True, entropy=True)
TERMS = {  # ours to the original's, as it logs them
    "reconstruction": "rec_loss",
    "perceptual": "perceptual_loss",
    "codebook": "vq_loss",
    "commitment": "commit_loss",
    "entropy": "entropy_loss",
    "shortcut_reconstruction": "direct_rec_loss",
    "shortcut_perceptual": "direct_p_loss",
}


class FixedTeacher:
    """Stands for the teacher: its features are given, as the golden's were."""

    def apply(self, variables, images):
        return variables["params"]


@functools.cache
def run():
    """Networks, optimizers, config, first state and frozen inputs of the goldens."""
    _, meta = rule.load(rule.GOLDEN / "train_step_gen_aux_only.npz")
    config = common.tokenizer("golden", "S-S")
    config.model.update(model_of({"name": "tiny_a", **meta}))
    config.loss.entropy, config.optim.schedule = 0.005, "constant"
    networks = networks_lib.Networks(
        tokenizer.make(config.model), discriminator.PatchGAN(), perceptual.LPIPS(), FixedTeacher()
    )
    rate = optim.learning_rate(config.optim, 10, 1)
    optimizer = optim.make_optimizer(config.optim)
    optimizers = tokenizer_step.Optimizers(optimizer, optimizer, rate, rate)
    judge = convert_discriminator.from_torch(patchgan_state(), "patchgan")
    params = jax.tree.map(jnp.asarray, rule_params(config.model))
    first = tokenizer_step.TokenizerState(
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.key(0),
        params=params,
        ema_params=params,
        opt_state=optimizer.init(params),
        discriminator=judge["params"],
        discriminator_stats={"batch_stats": judge["batch_stats"]},
        discriminator_opt_state=optimizer.init(judge["params"]),
        codebook_used=jnp.zeros(tokenizer_step.HISTORY),
    )
    teacher = np.random.RandomState(21).standard_normal((2, 256, 768)).astype(np.float32)
    lpips = names.from_torch(rule.lpips_state(), frozen_names.lpips_entries())
    return networks, optimizers, config, first, {"teacher": teacher, "lpips": lpips}


def patchgan_state():
    manifest = [
        (entry.name, shape) for entry, shape in patchgan_shapes()
    ]  # running statistics included
    return rule.rule_state(manifest, "discriminator.")


def patchgan_shapes():
    module = discriminator.PatchGAN()
    init = functools.partial(module.init, train=True)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    for entry in convert_discriminator.entries("patchgan"):
        array = np.empty(trees.flatten(shapes)[entry.path].shape, np.bool_)
        yield entry, names.LAYOUTS[entry.layout][1](array).shape


@functools.cache
def compiled_gradients():
    """Gradients of one step as a function of the adversarial weight."""
    networks, _, config, _, _ = run()

    @jax.jit
    def gradients(first, images, fixed, adversarial):
        loss = types.SimpleNamespace(**config.loss.to_dict() | {"adversarial": adversarial})
        weighted = types.SimpleNamespace(loss=loss)
        return tokenizer_step.gradients(first, images, fixed, ALL_ON, networks, weighted, groups=1)

    return gradients


@functools.cache
def gradients(adversarial: float):
    _, _, _, first, fixed = run()
    return compiled_gradients()(first, rule.block_images()[:2], fixed, adversarial)


@functools.cache
def updated():
    """State after the step with every term on."""
    _, optimizers, config, first, _ = run()
    update = jax.jit(lambda s, g: tokenizer_step._update(s, g, optimizers, config, ALL_ON)[0])
    return update(first, gradients(0.5))


def original(tree, of="generator") -> dict[str, np.ndarray]:
    """Tensors under the original's names and layouts."""
    if of == "generator":
        table = [
            e for e in tokenizer_names.entries(run()[2].model) if not e.path.startswith("buffers")
        ]
        return names.to_torch(tree, table)
    table = convert_discriminator.entries("patchgan")
    table = [e for e in table if e.path.startswith("params")]
    return names.to_torch({"params": tree}, table)


def first8(tensors, order) -> np.ndarray:
    rows = [tensors[name].reshape(-1)[:8] for name in order]
    return np.stack([np.pad(row, (0, 8 - len(row))) for row in rows])


def meaningful(order) -> np.ndarray:
    """False for the biases of keys, whose gradient is zero in exact arithmetic."""
    return np.array([not name.endswith("in_proj_bias") for name in order])


def check_gradients(grads, golden, order, within=1.0, most=1e-2, quantiles=None):
    """Norms to 2e-3, first elements to 1e-2 of the tensor's rms: for a share `within` of the
    tensors, and to `most` for the others; `quantiles` bounds shares of them more closely."""
    norm = np.array([np.linalg.norm(grads[name].astype(np.float64)) for name in order])
    np.testing.assert_allclose(norm, golden["grad_norm"], rtol=2e-3, atol=1e-9)
    size = np.array([grads[name].size for name in order])
    rms = golden["grad_norm"] / np.sqrt(size) + 1e-12
    off = np.abs(first8(grads, order) - golden["grad_first8"]).max(1) / rms
    assert np.mean(off <= 1e-2) >= within
    assert off.max() <= most
    for share, bound in (quantiles or {}).items():
        assert np.quantile(off, share) <= bound, share


def check_update(before, after, golden, order, grads):
    delta = {name: after[name] - before[name] for name in order}
    ours, theirs = first8(delta, order), golden["delta_first8"]
    size = np.array([grads[name].size for name in order])
    rms = (golden["grad_norm"] / np.sqrt(size))[:, None]
    clear = np.abs(golden["grad_first8"]) > 2e-2 * rms
    assert np.abs(ours - theirs)[clear].max() <= 2e-6
    assert np.abs(ours).max() <= 1.1e-4  # Adam's first step is the learning rate at most
    assert clear.mean() > 0.5


# With the adversarial term, rounding flips a few signs of LeakyReLU and ReLU in the loss networks,
# which moves image gradients by 4e-3, and so all others: how far depends on the processor. Measured
# on a processor without AVX-512 at 1cbdabb: a relative change of 1e-7 in the parameters moves 18 of
# our own 465 tensors by over 1e-2 (median 1.2e-3, 90% 5.5e-3, most 2.5e-2) and 1 of the 13 of the
# discriminator; the golden is as far (20; 1.1e-3, 5.6e-3, 2.4e-2; 1 of 13). The original in float64
# is 1.14e-2 from it, in float32 on another machine 1.22e-2. Behind fixed image gradients ours is
# within 1.5e-4 of float64 in all tensors. An error of ours would show in the median.
NOISE_OF_KINKS = {"most": 3e-2, "quantiles": {0.5: 2e-3, 0.9: 8e-3}}


@pytest.mark.parametrize(
    ("name", "adversarial", "noise"),
    [
        ("train_step_gen_aux_only", 0.0, {}),
        ("train_step_gen_aux_and_disc", 0.5, NOISE_OF_KINKS | {"within": 0.94}),
    ],
)
def test_generator_gradients(name, adversarial, noise):
    golden, meta = rule.load(rule.GOLDEN / f"{name}.npz")
    out = gradients(adversarial)
    np.testing.assert_allclose(out.scalars["loss"], meta["loss"], rtol=1e-4)
    total = np.sqrt(sum(np.sum(np.square(np.float64(g))) for g in jax.tree.leaves(out.generator)))
    np.testing.assert_allclose(total, meta["global_grad_norm"], rtol=1e-3)
    order = json.loads(str(golden["names"]))
    check_gradients(original(out.generator), golden, order, **noise)


def test_generator_update_and_average():
    golden, _ = rule.load(rule.GOLDEN / "train_step_gen_aux_and_disc.npz")
    order = json.loads(str(golden["names"]))
    grads = original(gradients(0.5).generator)
    before, after = original(run()[3].params), original(updated().params)
    check_update(before, after, golden, order, grads)
    average = first8(original(updated().ema_params), order)
    np.testing.assert_allclose(average, golden["ema9999_first8"], rtol=0, atol=1e-6)
    used = np.asarray(updated().codebook_used)[-512:]
    assert np.mean(used == golden["codebook_used_last512"]) > 0.98  # near ties may differ


def test_discriminator_gradients_and_update():
    golden, meta = rule.load(rule.GOLDEN / "train_step_disc_aux_and_disc.npz")
    order = json.loads(str(golden["names"]))
    out = gradients(0.5)
    np.testing.assert_allclose(out.scalars["discriminator_loss"], meta["loss"], rtol=1e-4)
    grads = original(out.discriminator, "discriminator")
    check_gradients(grads, golden, order, within=0.9, **NOISE_OF_KINKS)
    before = original(run()[3].discriminator, "discriminator")
    after = original(updated().discriminator, "discriminator")
    check_update(before, after, golden, order, grads)


def test_discriminator_statistics_follow_five_passes():
    golden, _ = rule.load(rule.GOLDEN / "train_step_disc_aux_and_disc.npz")
    stats = updated().discriminator_stats["batch_stats"]
    for i in (1, 2, 3):
        ours, theirs = stats[f"norm_{i}"], f"after_disc_main.{3 * i}"
        np.testing.assert_allclose(ours["mean"], golden[f"{theirs}.running_mean"], atol=1e-5)
        np.testing.assert_allclose(ours["var"], golden[f"{theirs}.running_var"], rtol=1e-4)
        assert ours["count"] == golden[f"{theirs}.num_batches_tracked"]


@pytest.mark.parametrize("case", ["aux_only", "mid", "disc", "aux_and_disc"])
def test_terms_of_each_phase(case):
    golden = json.loads((rule.GOLDEN / "train_terms.json").read_text())["cases"][case]
    config = run()[2]
    loss = types.SimpleNamespace(**config.loss.to_dict())
    loss.shortcut_end, loss.discriminator_start = golden["aux_loss_end"], golden["disc_start"]
    phase = objective.phase_at(golden["global_step"] - 1, loss, config.codebook)
    terms = {name: float(value) for name, value in gradients(0.5).scalars.items()}
    off = set() if phase.shortcut else {n for n in terms if n.startswith("shortcut")} | {"feature"}
    off |= set() if phase.adversarial else {n for n in terms if n.endswith("adversarial")}
    theirs = golden["generator"]
    for name, other in TERMS.items():
        value = 0.0 if name in off else terms[name]
        assert value == pytest.approx(theirs[f"(Generator){other}"], rel=1e-4, abs=1e-5), name
    adversarial = ("adversarial", "shortcut_adversarial")
    value = sum(terms[name] for name in adversarial if name not in off)
    parts = [*TERMS, "alignment", "feature"]
    total = value + sum(terms[name] for name in parts if name not in off)
    assert total == pytest.approx(theirs["total_generator_loss"], rel=1e-4)
