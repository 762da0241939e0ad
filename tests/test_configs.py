"""Every config builds; the published ones hold the published numbers and parameter counts."""

import ast
import importlib
import json
import pathlib
import re

import pytest

import main
from configs import common
from gigatok_jax import errors, model_config
from gigatok_jax.models import parameters
from gigatok_jax.run import command_line

ROOT = pathlib.Path(__file__).parents[1]
COUNTS = json.loads((ROOT / "tests/golden/manifests/_summary.json").read_text())
RUNS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "common")

# name: model, manifest, epochs, batch, warm-up epochs, entropy, shortcut end, discriminator start
PUBLISHED = {
    "ss": ("S-S", "VQ_SS256", 100, 128, 0, 0, 15_000, 20_000),
    "sb": ("S-B", "VQ_SB256", 200, 128, 0, 0, 15_000, 20_000),
    "sl": ("S-L", None, 200, 256, 0, 0, 15_000, 20_000),
    "bl": ("B-L", "VQ_BL256", 200, 256, 0, 0, 15_000, 20_000),
    "bl_dinodisc": ("B-L", "VQ_BL256_dino_disc", 200, 256, 0, 0, 15_000, 80_000),
    "bl_simple": ("B-L", "VQ_BL256_train_new", 200, 256, 1, 5e-3, 0, 20_000),
    "xlxxl": ("XL-XXL", "VQ_XLXXL256", 300, 256, 1, 5e-3, 0, 20_000),
    "ss_2d": ("S-S-2D", "VQ_SS256_2d", 100, 128, 0, 0, 15_000, 20_000),
    "sb_2d": ("S-B-2D", "VQ_SB256_2d", 200, 128, 0, 0, 15_000, 20_000),
    "bl_2d": ("B-L-2D", "VQ_BL256_2d", 200, 256, 0, 5e-3, 15_000, 20_000),
}


def get(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg)


@pytest.mark.parametrize("name", RUNS)
def test_config_locks_and_names_itself(name):
    config = get(name).lock()
    assert config.name == {"ar": "ar_b"}.get(name, name)
    assert config.task in main.TASKS
    with pytest.raises((AttributeError, KeyError)):
        config.no_such_key = 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_is_the_published_one(name):
    size, _, *numbers = PUBLISHED[name]
    config = get(name)
    loss, optim, train = config.loss, config.optim, config.train
    found = [train.epochs, train.global_batch, optim.warmup_epochs]
    assert [*found, loss.entropy, loss.shortcut_end, loss.discriminator_start] == numbers
    assert config.model == model_config(size, rotation=name != "bl_simple")
    assert optim.decay_mask == ("no_norm" if name == "xlxxl" else "all")
    assert loss.discriminator == ("dino" if name == "bl_dinodisc" else "patchgan")


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_every_published_recipe_shares(name):
    config = get(name)
    optim, loss = config.optim, config.loss
    adam = (optim.beta1, optim.beta2, optim.weight_decay, optim.clip, optim.ema)
    assert adam == (0.9, 0.95, 1e-4, 10, 0.9999)
    rates = (optim.learning_rate, optim.discriminator_learning_rate, optim.end_learning_rate)
    assert (optim.schedule, *rates) == ("cosine", 1e-4, 1e-4, 1e-5)
    assert (config.model.align_block, loss.alignment, loss.teacher) == (3, 0.5, "dinov2-b")
    assert loss.adversarial_type == "hinge"
    weights = (loss.reconstruction, loss.perceptual, loss.adversarial, loss.feature)
    assert (*weights, loss.codebook, loss.commitment) == (1, 1, 0.5, 1, 1, 0.25)
    assert loss.entropy_temperature == 0.01
    assert (config.train.epoch_images, loss.missing_weights) == (1_280_000, "refuse")
    assert not any(config.codebook.values())  # no cures against collapse


@pytest.mark.parametrize("name", [name for name in PUBLISHED if PUBLISHED[name][1]])
def test_parameter_counts_equal_the_original(name):
    expected = COUNTS[PUBLISHED[name][1]]
    params = parameters.abstract_params(get(name).model)
    parts = {part: parameters.count(tree) for part, tree in params.items()}
    assert sum(parts.values()) == expected["total_params"]
    assert parameters.count_alignment(params) == expected["distill_mlp_params"]
    # Modules are named differently; their sizes are the same.
    assert sorted(parts.values()) == sorted(expected["params_by_top_module"].values())


def test_sl_count():
    """No manifest of the original holds this size; its parts stand in S-S and B-L."""
    count = parameters.count(parameters.abstract_params(get("sl").model))
    encoders = [COUNTS[name]["params_by_top_module"]["s2to1encoder"] for name in SAME_DECODER]
    assert count == COUNTS["VQ_BL256"]["total_params"] - encoders[1] + encoders[0]


SAME_DECODER = ("VQ_SS256", "VQ_BL256")


@pytest.mark.parametrize("name", PUBLISHED)
def test_small_versions_cross_every_phase(name):
    for arg in ("smoke", "smoke_full"):
        config = get(name, arg)
        steps = config.train.steps
        assert config.name == f"{name}_{arg}"  # its own workdir
        assert config.loss.missing_weights == "skip"
        assert 1 < config.loss.discriminator_start <= steps
        if get(name).loss.shortcut_end:
            assert 1 < config.loss.shortcut_end <= steps
        for every in (config.save.every, config.eval.every, config.log.pictures_every):
            assert every <= steps


@pytest.mark.parametrize("name", PUBLISHED)
def test_smoke_is_small_and_smoke_full_is_not(name):
    count = parameters.count(parameters.abstract_params(get(name, "smoke").model))
    assert count < 10_000_000
    assert get(name, "smoke_full").model == get(name).model


# size: parameters as published, batch
PRIORS = {
    "b": (111_085_824, 256),
    "l": (343_174_144, 256),
    "xl": (775_028_480, 256),
    "xxl": (1_411_367_424, 512),
}


@pytest.mark.parametrize("size", PRIORS)
def test_prior_recipe_is_the_published_one(size):
    config, (count, batch) = get("ar", f"size={size}"), PRIORS[size]
    train, optim = config.train, config.optim
    assert config.name == f"ar_{size}"  # its own workdir
    assert config.model == model_config(f"prior-{size.upper()}")
    assert parameters.count(parameters.abstract_params(config.model)) == count
    assert (train.epochs, train.epoch_images, train.global_batch) == (300, 1_280_000, batch)
    dropouts = (train.dropout, train.token_dropout, train.class_dropout, train.drop_path)
    assert dropouts == (0.1, 0.1, 0.1, 0)
    rate = (optim.schedule, optim.learning_rate, optim.warmup_epochs, optim.wsd_decay_fraction)
    assert rate == ("wsd", 1e-4, 1, 0.2)
    adam = (optim.beta1, optim.beta2, optim.weight_decay, optim.decay_mask, optim.clip, optim.ema)
    assert adam == (0.9, 0.95, 0.05, "matrices", 1, 0.9999)
    assert (config.cfg.scale, config.cfg.schedule, config.cfg.start) == (1.75, "step", 0.18)


@pytest.mark.parametrize("arg", ["smoke", "smoke_full"])
def test_small_priors_need_no_tokenizer(arg):
    config = get("ar", f"size=xl,{arg}")
    assert config.name == f"ar_xl_{arg}"
    assert config.tokenizer == "untrained" and not config.codes
    assert config.data.source == "digits" and config.train.steps <= 12
    assert 0 < config.optim.warmup_steps < config.train.steps
    assert (config.model == get("ar", "size=xl").model) == (arg == "smoke_full")
    if arg == "smoke":
        assert parameters.count(parameters.abstract_params(config.model)) < 1_000_000


def test_a_prior_of_no_known_size_is_refused():
    with pytest.raises(errors.ConfigError, match=r"model is 'prior-S', expected one of prior-B"):
        get("ar", "size=s")


def test_arguments():
    arg = common.parse_arg("smoke,latent_tokens=64", smoke=False, latent_tokens=256, size="b")
    assert vars(arg) == {"smoke": True, "latent_tokens": 64, "size": "b"}
    assert vars(common.parse_arg(None, smoke=False)) == {"smoke": False}
    assert common.parse_arg("smoke=false", smoke=True).smoke is False
    assert get("ss", "latent_tokens=64").model.latent_tokens == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smok", "takes smoke, latent_tokens; did you mean 'smoke'"),
        ("latent_tokens=many", "latent_tokens is 'many', expected int like 256"),
        ("smoke=maybe", "smoke is 'maybe', expected bool"),
    ],
)
def test_wrong_arguments_are_refused(text, message):
    with pytest.raises(errors.ConfigError, match=message):
        common.parse_arg(text, smoke=False, latent_tokens=256)


def test_a_size_that_cannot_be_built_is_refused():
    with pytest.raises(errors.ConfigError, match="latent_tokens is 100, expected a power of two"):
        get("ss", "latent_tokens=100")


@pytest.mark.parametrize("name", [*RUNS, "common"])
def test_configs_import_names_and_sizes_alone(name):
    tree = ast.parse((ROOT / f"configs/{name}.py").read_text())
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    allowed = {"configs", "gigatok_jax.model_config", "gigatok_jax.errors"}
    assert froms <= allowed


@pytest.mark.parametrize("name", [name for name in RUNS if name not in PUBLISHED or name == "ss"])
def test_every_key_is_read(name):
    pytest.importorskip(main.TASKS[get(name).task][0])
    sources = [ROOT / "main.py", *(ROOT / "gigatok_jax").glob("**/*.py")]
    text = "\n".join(path.read_text() for path in sources)
    keys = {key.rpartition(".")[2] for key, _ in command_line.flatten(get(name))}
    assert not {key for key in keys if not re.search(rf'\.{key}\b|"{key}"', text)}
