"""The prior computes what the original computes, and learns alike. Weights are by rule.

Rotary positions have no golden here: the original's are misaligned (its base is 1 and its first
rows are zero). `test_ar.py` compares ours with a reference written from the paper.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rule
from test_conversion_ar import rule_params
from test_train_goldens import check_gradients, check_update, first8

from configs import common
from gigatok_jax.conversion import ar as convert
from gigatok_jax.model_config import model_config
from gigatok_jax.models import ar, ar_decoding
from gigatok_jax.train import ar as training
from gigatok_jax.train import optim

SMALL = ["default", "adaLN", "simple_adaLN", "qknorm", "gqa"]


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def model_of(meta: dict):
    """Our config for the arguments that the golden's model was built with."""
    args = meta["args"]
    sizes = {"layers": "n_layer", "heads": "n_head", "kv_heads": "n_kv_head", "width": "dim"}
    adaln = "full" if args.get("use_adaLN") else "none"
    return model_config(
        "prior-B",
        **{ours: args[theirs] for ours, theirs in sizes.items() if theirs in args},
        vocab=args["vocab_size"],
        tokens=args["block_size"],
        classes=args["num_classes"],
        qk_norm=args.get("use_qk_norm", False),
        adaln="shared" if args.get("use_simple_adaLN") else adaln,
    )


def loss(logits, codes):
    """Mean cross-entropy in nats per code."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, codes))


@functools.partial(jax.jit, static_argnums=(0, 4))
def run(prior, params, class_ids, codes, block):
    """Logits, features of one block and loss."""
    logits = prior.apply({"params": params}, class_ids, codes)
    return logits, ar_decoding.features(prior, params, class_ids, codes, block), loss(logits, codes)


@pytest.mark.parametrize("name", SMALL)
def test_small_priors(name):
    golden, meta = rule.load(rule.golden_path(f"gpt_small_{name}.npz"))
    model = model_of(meta)
    prior, params = ar.make(model), rule_params(model)
    logits, features, value = run(prior, params, golden["cond"], golden["idx"], 2)
    np.testing.assert_allclose(logits[:, :, ::4], golden["logits_v4"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(logits[0, 7], golden["logits_b0_pos7"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(features[:, ::4], golden["feat_layer2"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(value, meta["loss"], rtol=1e-5)
    nobody = np.full_like(golden["cond"], model.classes)
    value = run(prior, params, nobody, golden["idx"], 2)[2]
    np.testing.assert_allclose(value, meta["null_class_loss"], rtol=1e-5)


def test_one_step_of_training():
    golden, meta = rule.load(rule.golden_path("gpt_small_opt_step.npz"))
    model, order = model_of(meta), json.loads(str(golden["names"]))
    prior, params = ar.make(model), rule_params(model)

    def objective(params):
        return loss(prior.apply({"params": params}, golden["cond"], golden["idx"]), golden["idx"])

    value, grads = jax.jit(jax.value_and_grad(objective))(params)
    np.testing.assert_allclose(value, meta["loss"], rtol=1e-5)
    np.testing.assert_allclose(optax.tree.norm(grads), meta["global_grad_norm"], rtol=1e-3)
    updated = step(params, grads, meta)
    before, after, grads = (convert.to_torch(tree, model) for tree in (params, updated, grads))
    check_gradients(grads, golden, order)
    check_update(before, after, golden, order, grads)
    check_decay(before, after, grads, meta)
    np.testing.assert_allclose(first8(after, order), golden["after_first8"], rtol=0, atol=1e-5)
    for name, of in (("mean", np.mean), ("std", np.std)):
        ours = [of(after[key], dtype=np.float64) for key in order]
        np.testing.assert_allclose(ours, golden[f"after_{name}"], rtol=0, atol=1e-6)


def step(params, grads, meta):
    """Parameters after the update that a config of priors asks for."""
    config = common.tokenizer("golden", "S-S").optim
    config.update(beta1=meta["betas"][0], beta2=meta["betas"][1], clip=meta["max_grad_norm"])
    config.update(weight_decay=meta["weight_decay"], decay_mask="matrices")
    optimizer = optim.make_optimizer(config, training.is_decayed)

    @jax.jit
    def update(params, grads):
        return optim.apply(optimizer, grads, optimizer.init(params), params, meta["lr"]).params

    return update(params, grads)


def check_decay(before, after, grads, meta):
    """Codes and classes that the batch does not hold move by weight decay alone."""
    for name in ("tok_embeddings.weight", "cls_embedding.embedding_table.weight"):
        unused = ~np.any(grads[name], axis=1)
        assert unused.any()
        expected = before[name] * (1 - meta["lr"] * meta["weight_decay"])
        np.testing.assert_allclose(after[name][unused], expected[unused], rtol=3e-7, atol=0)


@pytest.mark.goldens
def test_full_size_prior():
    golden, meta = rule.load(rule.shared_path("gpt_B_train_fwd.npz"))
    model = model_of(meta)
    prior, params = ar.make(model), rule_params(model)
    logits, _, value = run(prior, params, golden["cond"], golden["idx"], 1)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=5e-4)
    close(logits[:, ::8, ::64], golden["logits_t8_v64"])
    close(logits[0, 100], golden["logits_b0_pos100"])
    close(jax.nn.logsumexp(logits, axis=-1), golden["logsumexp"])
    best = np.sort(logits, axis=-1)[:, :, -2:]
    clear = best[..., 1] - best[..., 0] > 1e-3
    assert np.all((np.argmax(logits, -1) == golden["argmax"])[clear])
    np.testing.assert_allclose(value, meta["loss"], rtol=1e-5)
    nobody = np.full_like(golden["cond"], model.classes)
    features = jax.jit(ar_decoding.features, static_argnums=(0, 4))(
        prior, params, nobody, golden["idx"], 6
    )
    close(features[:, ::8], golden["null_feat_layer6_t8"])
    close(features.mean(1), golden["null_feat_layer6_mean"])
