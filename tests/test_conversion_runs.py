"""Runs go on where the other program stopped: optimizers, averages, discriminators, steps."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_conversion_files import command, random_state, refused, small

from gigatok_jax import trees
from gigatok_jax.conversion import run_state
from gigatok_jax.errors import CheckpointError
from gigatok_jax.models import discriminator as modules
from gigatok_jax.run import checkpoint
from gigatok_jax.train import ar_step, optim, tokenizer_step
from gigatok_jax.train.networks import Networks
from gigatok_jax.train.tokenizer_step import Optimizers
from gigatok_jax.weights import discriminator_names, names, read, recognise, tables, write

CONFIG = """
from configs import common

def get_config(arg=None):
    config = common.tokenizer("small", "S-S", **{fields})
    config.loss.update(discriminator_filters=4)
    config.train.update(steps=100)
    config.optim.first_moment = "bfloat16"
    return config
"""


def judge_state(kind: str) -> dict[str, np.ndarray]:
    """Random state dict of a discriminator."""
    module = modules.PatchGAN(4) if kind == "patchgan" else modules.DinoDiscriminator()
    keys = {"params": jax.random.key(0), "augment": jax.random.key(1)}
    images = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(lambda: module.init(keys, images, train=True))
    outlines = names.tensors(trees.flatten(shapes), discriminator_names.entries(kind))
    rng, made = np.random.default_rng(3), {}
    for name, outline in outlines.items():
        integer = name.endswith("tracked")
        made[name] = np.asarray(9) if integer else rng.normal(size=outline.shape).astype("f4")
    return made


def fixed(name: str) -> bool:
    """Whether an entry of a state dict is no parameter."""
    leaf = name.rpartition(".")[2]
    return leaf in ("codebook_used", "num_batches_tracked", "weight_u", "weight_v") or (
        leaf.startswith("running_")
    )


def in_torch(tensors, kind="") -> list:
    """Parameters in the order in which the original hands them to its optimizer."""
    torch = pytest.importorskip("torch")
    order = [name for name in tensors if not fixed(name)]
    if kind == "prior":
        matrices = [name for name in order if tensors[name].ndim >= 2]
        order = [*matrices, *(name for name in order if tensors[name].ndim < 2)]
    return [torch.nn.Parameter(torch.from_numpy(np.array(tensors[name]))) for name in order]


def groups_of(parameters, kind: str):
    if kind != "prior":
        return parameters
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def adam(tensors, kind="", steps=2):
    """An AdamW of PyTorch that has made a few steps, and what it updates."""
    torch = pytest.importorskip("torch")
    parameters = in_torch(tensors, kind)
    made = torch.optim.AdamW(groups_of(parameters, kind), 1e-4, (0.9, 0.95), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        made.step()
    return made, parameters


def torch_tensors(tree):
    torch = pytest.importorskip("torch")
    return {name: torch.from_numpy(np.array(x)) for name, x in tree.items()}


def training_file(path, model, judge=None, steps=2) -> dict:
    """Written by PyTorch as the original's trainers do; its content."""
    torch = pytest.importorskip("torch")
    import argparse

    states = [random_state(model, seed) for seed in (0, 1)]
    for one in states[1:]:
        one.get("quantize.codebook_used", np.zeros(0))[:] = 0
    saved = {
        "model": torch_tensors(states[0]),
        "ema": torch_tensors(states[1]),
        "optimizer": adam(states[0], model.kind, steps)[0].state_dict(),
        "steps": 40,
        "args": argparse.Namespace(lr=1e-4, name="run"),
    }
    if judge is not None:
        saved["discriminator"] = torch_tensors(judge)
        saved["optimizer_disc"] = adam(judge, "", max(steps - 1, 0))[0].state_dict()
    torch.save(saved, path)
    return saved


def check_equal(found, expected, path=""):
    torch = pytest.importorskip("torch")
    if isinstance(expected, dict):
        assert set(found) >= set(expected), path
        for key in expected:
            check_equal(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), path
    else:
        assert found == expected, path


@pytest.mark.parametrize("kind", ["patchgan", "dino", "prior"])
def test_a_run_goes_there_and_back_bit_for_bit(tmp_path, kind):
    torch = pytest.importorskip("torch")
    model = small("prior-B" if kind == "prior" else "S-S")
    judge = None if kind == "prior" else judge_state(kind)
    saved = training_file(tmp_path / "x.pt", model, judge)
    saved.pop("args")
    command("from_torch", tmp_path / "x.pt", tmp_path / "run")
    command("to_torch", tmp_path / "run", tmp_path / "y.pt")
    found = torch.load(tmp_path / "y.pt", weights_only=True)
    check_equal(found, saved)
    for part in ("model", "ema"):
        assert list(found[part]) == list(saved[part])  # the order is the original's
    other, _ = adam(random_state(model, 5), model.kind, 0)
    other.load_state_dict(found["optimizer"])
    check_equal(other.state_dict()["state"], saved["optimizer"]["state"])


def test_moments_lie_where_their_parameters_do(tmp_path):
    """Moments that are made of the parameters become the same functions of our parameters."""
    model = small("prior-B")
    tensors = random_state(model)
    parts = {
        "model": {n: names.Promise(x.shape, x.dtype, lambda x=x: x) for n, x in tensors.items()}
    }
    order = run_state.parameter_order(tensors, tables.entries(model), "prior")
    states = {
        i: {"step": np.float32(5), "exp_avg": 2 * tensors[name], "exp_avg_sq": tensors[name] ** 2}
        for i, name in enumerate(order)
    }
    optimizer = {"state": states, "param_groups": [{"params": list(range(len(order)))}]}
    arrays = run_state.to_ours(parts, {"optimizer": optimizer}, 5, model)
    arrays = {path: names.value_of(array) for path, array in arrays.items()}
    params = names.below(arrays, "params/")
    for path, array in params.items():
        np.testing.assert_array_equal(arrays[f"opt_state/1/mu/{path}"], 2 * array)
        np.testing.assert_array_equal(arrays[f"opt_state/1/nu/{path}"], array**2)
    assert arrays["opt_state/1/count"] == 5 and arrays["step"] == 5


def described(tree) -> dict:
    """Paths, shapes and types of a state of ours."""
    flat = trees.flatten(tree)
    key = jax.eval_shape(jax.random.key_data, flat["rng"])
    return {p: (x.shape, np.dtype(x.dtype)) for p, x in (flat | {"rng": key}).items()}


@pytest.mark.parametrize("kind", ["patchgan", "none"])
def test_a_tokenizers_run_gets_exactly_the_state_that_it_restores(kind):
    from gigatok_jax.models import tokenizer

    model = small()
    tensors = random_state(model)
    parts = {
        "model": {n: names.Promise(x.shape, x.dtype, lambda x=x: x) for n, x in tensors.items()}
    }
    if kind == "patchgan":
        judge = judge_state(kind)
        parts["discriminator"] = {
            n: names.Promise(x.shape, x.dtype, lambda x=x: x) for n, x in judge.items()
        }
    arrays = run_state.to_ours(parts, {}, 0, model, fallback="none")
    adam = optim.make_optimizer(small_optim())
    networks = Networks(tokenizer.make(model), modules.PatchGAN(4) if kind == "patchgan" else None)
    optimizers = Optimizers(adam, adam, None, None)
    create = functools.partial(tokenizer_step.create, networks, optimizers, 16, 0)
    expected = described(jax.eval_shape(create))
    assert {p: (tuple(x.shape), np.dtype(x.dtype)) for p, x in arrays.items()} == expected


def test_a_priors_run_gets_exactly_the_state_that_it_restores():
    from gigatok_jax.models import ar

    model = small("prior-B")
    tensors = random_state(model)
    parts = {"ema": {n: names.Promise(x.shape, x.dtype, lambda x=x: x) for n, x in tensors.items()}}
    arrays = run_state.to_ours(parts, {}, 0, model, first_moment="bfloat16")
    adam = optim.make_optimizer(small_optim(first_moment="bfloat16"))
    create = functools.partial(ar_step.create, ar.make(model), adam, 0)
    expected = described(jax.eval_shape(create))
    assert {p: (tuple(x.shape), np.dtype(x.dtype)) for p, x in arrays.items()} == expected


def small_optim(**changes):
    from configs import common

    made = common.prior("x", "prior-B").optim
    made.update(decay_mask="all", **changes)
    return made


def test_a_file_without_an_optimizer_says_so_and_starts_it_anew(tmp_path, capsys):
    """As the original's trainer for models in shards leaves them."""
    model = small("prior-B")
    write.write_pt(tmp_path / "x.pt", {"model": random_state(model), "steps": 9})
    command("from_torch", tmp_path / "x.pt", tmp_path / "run")
    told = capsys.readouterr().out
    assert "optimizer is not there" in told and "starts anew" in told
    assert "the trained one and the average start equal" in told
    state_of, extras = checkpoint.load_params(tmp_path / "run", ("opt_state", "step"))
    assert extras["step"] == 9 and state_of["step"] == 9
    assert state_of["opt_state"]["1"]["count"] == 0
    assert not any(np.any(x) for x in jax.tree.leaves(state_of["opt_state"]))


def test_an_optimizer_of_another_model_is_refused(tmp_path, capfd):
    model = small("prior-B")
    saved = {"model": random_state(model), "steps": 1}
    shape = (3,)
    state_of = {
        "step": np.ones((), np.float32),
        "exp_avg": np.zeros(shape),
        "exp_avg_sq": np.zeros(shape),
    }
    for count, expected in ((3, "has 3 parameters, the model 19"), (19, "numbered in another")):
        numbers = list(range(count))
        groups = [{"lr": 1e-4, "params": numbers}]
        saved["optimizer"] = {"state": dict.fromkeys(numbers, state_of), "param_groups": groups}
        path = tmp_path / f"{count}.pt"
        write.write_pt(path, saved)
        assert expected in refused(capfd, "from_torch", path, tmp_path / "run")
    saved["optimizer"] = {"shards": 8}
    write.write_pt(tmp_path / "z.pt", saved)
    message = refused(capfd, "from_torch", tmp_path / "z.pt", tmp_path / "run")
    assert "not the state of an optimizer" in message
    assert not list(tmp_path.glob("run*"))


def test_a_config_makes_a_workdir_that_the_same_command_resumes(tmp_path, capfd):
    torch = pytest.importorskip("torch")
    model = small(l2_norm=False)
    saved = training_file(tmp_path / "x.pt", model, judge_state("patchgan"))
    fields = {k: v for k, v in model.to_dict().items() if k != "kind"}
    (tmp_path / "config.py").write_text(CONFIG.replace("{fields}", repr(fields)))
    command("from_torch", tmp_path / "x.pt", tmp_path / "run", "--config", tmp_path / "config.py")
    assert "--config=" in capfd.readouterr().out
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["model"]["l2_norm"] is False  # the config's word counts where nothing shows
    _, extras = checkpoint.load_params(tmp_path / "run", ())
    assert extras["config"] == kept and extras["step"] == 40
    # The rate that goes back is the one of the next update.
    command("to_torch", tmp_path / "run", tmp_path / "y.pt")
    from gigatok_jax.weights import torch_file

    group = torch_file.load(tmp_path / "y.pt")["optimizer"]["param_groups"][0]
    expected = optim.cosine(39, 1e-4, 0, 100, 1e-5)
    np.testing.assert_allclose(group["lr"], expected, rtol=1e-6)
    # First moments are kept as the config says, and go back widened.
    found = torch.load(tmp_path / "y.pt", weights_only=True)
    for name in ("optimizer", "optimizer_disc"):
        for i, state_of in saved[name]["state"].items():
            rounded = state_of["exp_avg"].to(torch.bfloat16).float()
            check_equal(found[name]["state"][i], state_of | {"exp_avg": rounded})
    text = CONFIG.replace("{fields}", repr(fields | {"codebook_size": 64}))
    (tmp_path / "config.py").write_text(text)
    message = refused(
        capfd, "from_torch", tmp_path / "x.pt", tmp_path / "z", "--config", tmp_path / "config.py"
    )
    assert "another model than the config: codebook_size 32 not 64" in message


def test_a_prior_remembers_whose_codes_it_learned(tmp_path):
    from gigatok_jax import library
    from gigatok_jax.conversion import tokenizer as convert

    model, prior = small(), small("prior-B")
    weights = random_state(model)
    write.write_pt(tmp_path / "tokenizer.pt", {"model": weights})
    write.write_pt(tmp_path / "prior.pt", {"model": random_state(prior)})
    name = ("--tokenizer", tmp_path / "tokenizer.pt")
    command("from_torch", tmp_path / "prior.pt", tmp_path / "run", *name)
    params = convert.from_torch(weights, model)
    parts = {part: params[part] for part in library.CODE_PARTS}
    assert read.read(tmp_path / "run").extras["tokenizer"] == library.fingerprint(parts)


def test_a_discriminator_alone_is_no_model(tmp_path):
    torch_state = judge_state("patchgan")
    write.write_pt(tmp_path / "x.pt", torch_state)
    assert recognise.kind_of(torch_state) == "patchgan"
    with pytest.raises(CheckpointError, match="holds a discriminator, expected"):
        read.read(tmp_path / "x.pt")
