"""Builds what the configs of runs share: arguments, base configs, and small versions of them."""

import types

import ml_collections

from gigatok_jax.errors import ConfigError, near
from gigatok_jax.model_config import model_config


def parse_arg(arg: str | None, **defaults) -> types.SimpleNamespace:
    """Parses the arguments behind the colon of `--config=configs/<run>.py:name,name=value`.

    Args:
        arg: "smoke", "size=b", "latent_tokens=64,smoke"; None or "" is no argument.
        **defaults: every name the run knows, with its default; its type is the type expected.

    Raises:
        ConfigError: a name that the run does not know, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, _, text = item.partition("=")
        if name not in defaults:
            known = ", ".join(defaults) or "none"
            hint = near(name, defaults)
            raise ConfigError(f"this config has no argument {name!r}; it takes {known}{hint}")
        values[name] = _read(name, text, defaults[name])
    return types.SimpleNamespace(**values)


def run_arg(arg: str | None, **defaults) -> types.SimpleNamespace:
    """Parses the arguments of a run of a published size: its own, and those that `finish` applies.

    smoke is a minute on a CPU, smoke_full three steps of the published widths, topology=v5p:4x4x4
    plans for absent hardware.
    """
    return parse_arg(arg, smoke=False, smoke_full=False, topology="", **defaults)


def _read(name, text, default):
    if isinstance(default, bool):
        flags = {"": True, "true": True, "false": False, "1": True, "0": False}
        if text.lower() in flags:
            return flags[text.lower()]
    else:
        try:
            return type(default)(text)
        except ValueError:
            pass
    kind = type(default).__name__
    raise ConfigError(f"config argument {name} is {text!r}, expected {kind} like {default!r}")


def tokenizer(name: str, size: str, **model) -> ml_collections.ConfigDict:
    """Builds the training config of a tokenizer with the published values, for a run to change.

    Args:
        name: of the run; the default workdir is `runs/<name>`.
        size: of the model, a name of `model_config` such as "S-S".
        **model: fields of the model that differ from that size.

    Steps count updates from 1, as `global_step` of the original; learning rates are per update;
    an epoch is `train.epoch_images` images whatever the data holds.
    """
    config = ml_collections.ConfigDict({"name": name, "task": "train_tokenizer", "seed": 0})
    config.model = model_config(size, **model)
    config.data = data_config()
    config.train = _train()
    config.train.statistics = "global"  # "local": batch statistics per micro-batch and device
    config.train.first_weights = "published"  # "geometry": attention begins local, 1D only
    config.optim = _optim()
    config.optim.discriminator_learning_rate = 1e-4
    config.loss = _loss()
    config.codebook = ml_collections.ConfigDict(
        {  # cures against collapse on small data; off in every published recipe
            "data_init": False,  # rows start as latents of the first batches
            "reset_every": 0,  # steps between resets of dead rows; 0 never
            "warmup_steps": 0,  # steps before anything is quantized
        }
    )
    config.weights = ml_collections.ConfigDict({"folder": ""})  # "" is ~/.cache/gigatok_jax
    return _keeping(config)


def prior(name: str, size: str) -> ml_collections.ConfigDict:
    """Builds the training config of a prior with the published values.

    Steps, learning rates and epochs mean what `tokenizer` says.

    Args:
        name: of the run.
        size: of the model, a name of `model_config` such as "prior-B".
    """
    config = ml_collections.ConfigDict({"name": name, "task": "train_prior", "seed": 0})
    config.model = model_config(size)
    config.tokenizer = ""  # a checkpoint; codes are then made from images, and samples drawn
    config.codes = ""  # a folder of extract_codes; "" takes the images of `data`
    config.eval_codes = ""  # the same of held-out images; "" takes a share out of `codes`
    config.cooldown_from = ""  # a checkpoint of a constant phase, whose rate decays from there
    config.data = data_config()
    config.train = _train()
    config.train.update(epochs=300.0, global_batch=256)
    dropouts = {"dropout": 0.1, "token_dropout": 0.1, "class_dropout": 0.1, "drop_path": 0.0}
    config.train.update(ml_collections.ConfigDict(dropouts))
    config.optim = _optim()
    config.optim.update(schedule="wsd", warmup_epochs=1.0, weight_decay=0.05, clip=1.0)
    config.optim.decay_mask = "matrices"
    config.cfg = cfg_config()
    config.sample = ml_collections.ConfigDict(
        {  # pictures along the way
            "classes": 8,
            "images": 4,  # of each class
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
        }
    )
    return _keeping(config)


def _keeping(config):
    """Adds to a config what every run that trains saves, evaluates, logs and runs on."""
    config.save = ml_collections.ConfigDict({"every": 5000, "keep": 3, "milestone_every": 50_000})
    config.eval = ml_collections.ConfigDict({"every": 5000, "batch": 64})
    config.log = ml_collections.ConfigDict({"every": 100, "pictures_every": 5000})
    config.profile = ""  # "start:count" in steps writes a trace
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.mesh.dcn = 1  # slices of TPUs, which data is divided over first
    config.mesh.topology = ""  # with --dry_run: devices to plan for, see planning/hardware.py
    config.mesh.rules = ""  # "pattern=axis,-;..." before the rules of parallel.py
    config.mesh.cpu_devices = 1  # parts of a host without accelerator; 0 is one per core
    config.cluster = cluster_config()
    return config


def cfg_config():
    """Builds the config of guidance, which compares samples with a class to samples without."""
    return ml_collections.ConfigDict(
        {
            "scale": 1.75,  # 1 is no guidance
            "schedule": "step",
            "start": 0.18,  # shares of the sequence
            "end": 1.0,
            "interval": -1,  # codes after which guidance ends; -1 is never
        }
    )


def cluster_config():
    """Builds the config by which processes of a cluster find each other.

    A launcher that is known fills in the first three fields.
    """
    return ml_collections.ConfigDict(
        {
            "coordinator": "",  # host:port of process 0
            "processes": 0,
            "process": -1,
            "start_seconds": 300.0,  # until all have to be there
            "hang_minutes": 30.0,  # without anything finished until a process ends; 0 is never
        }
    )


def data_config():
    """Builds the config of a run's images: source, crops, workers and held-out images."""
    return ml_collections.ConfigDict(
        {
            "source": "folder",  # "digits" is the embedded set, used while no folder is named
            "folder": "",  # images, in one sub-folder per class or none
            "eval_folder": "",  # held-out images
            "crop": "random",
            "flip": True,
            "min_size": 0,  # px; smaller images are refused rather than enlarged
            "workers": 4,
            "max_unreadable": 100,
            "eval_images": 0,  # held out, of the training images when there is no eval_folder
        }
    )


def _train():
    return ml_collections.ConfigDict(
        {
            "epochs": 100.0,
            "steps": 0,  # 0 follows from epochs
            "epoch_images": 1_280_000,
            "global_batch": 128,
            "micro_batches": 1,
            "dtype": "bfloat16",
            "remat": "none",  # "dots", "blocks", "full" keep less for the backward pass
            "unroll": "gpu",  # where each block is compiled apart: less copied, longer to compile
            "ema_memory": "device",  # "pinned_host" spares 4 bytes per parameter, and costs time
        }
    )


def _optim():
    return ml_collections.ConfigDict(
        {
            "learning_rate": 1e-4,
            "end_learning_rate": 1e-5,
            "schedule": "cosine",
            "warmup_steps": 0,
            "warmup_epochs": 0.0,
            "wsd_decay_fraction": 0.2,
            "beta1": 0.9,
            "beta2": 0.95,
            "first_moment": "float32",  # "bfloat16" spares 2 bytes per parameter
            "weight_decay": 1e-4,
            "decay_mask": "all",
            "clip": 10.0,
            "ema": 0.9999,
        }
    )


def _loss():
    return ml_collections.ConfigDict(
        {
            "reconstruction": 1.0,
            "perceptual": 1.0,
            "adversarial": 0.5,
            "adversarial_type": "hinge",
            "discriminator": "patchgan",
            "discriminator_filters": 64,  # of the PatchGAN's first layer
            "discriminator_start": 20_000,
            "shortcut_end": 15_000,  # 0 is no shortcut phase
            "feature": 1.0,
            "codebook": 1.0,
            "commitment": 0.25,
            "entropy": 0.0,
            "entropy_temperature": 0.01,
            "alignment": 0.5,
            "teacher": "dinov2-b",
            "missing_weights": "refuse",  # "skip" leaves a loss out and says so
        }
    )


def finish(config, arg) -> ml_collections.ConfigDict:
    """Applies to a config the arguments from `run_arg` that all runs share; returns the config."""
    config.mesh.topology = arg.topology
    if arg.smoke:
        shrink(config)
    if arg.smoke_full:
        smoke_full(config)
    return config


def shrink(config) -> None:
    """Shrinks a config to tiny widths on embedded data: the same code, a minute on a CPU."""
    config.name += "_smoke"
    if config.model.kind == "prior":
        config.model.update(layers=2, heads=2, kv_heads=2, width=64)
        config.model.update(vocab=64, tokens=16, classes=10)
    else:
        config.model.update(image_size=32, patch_size=2, cnn_channels=32)
        config.model.update(encoder="pico", decoder="pico", latent_tokens=16, codebook_size=64)
        config.loss.discriminator_filters = 8
    _shorten(config, steps=12, batch=4)
    config.eval.batch = 16


def smoke_full(config) -> None:
    """Changes a config to three steps of batch 2 in float32, to test whether published widths fit.

    The data are `--config.data.folder=DIR` or, without it, the embedded data.
    """
    config.name += "_smoke_full"
    _shorten(config, steps=3, batch=2)
    config.save.every = 3


def _shorten(config, steps, batch):
    """Changes a config so that all phases, evaluation, save and pictures fit into `steps`."""
    config.data.update(source="digits", workers=0, eval_images=batch)
    config.train.update(steps=steps, global_batch=batch, dtype="float32")
    config.train.update(remat="none", unroll="")
    if config.optim.warmup_epochs:
        config.optim.update(warmup_epochs=0.0, warmup_steps=steps // 3)
    if config.model.kind == "prior":
        config.tokenizer = "untrained"  # random codes: nobody has a tokenizer at hand
        config.sample.update(classes=2, images=2)
    else:
        half = 1 + steps // 2  # one step ends and starts phases, to compile only twice
        config.loss.discriminator_start = half
        if config.loss.shortcut_end:
            config.loss.shortcut_end = half
        config.loss.missing_weights = "skip"
    config.eval.update(every=steps, batch=batch)
    config.save.update(every=steps // 2, milestone_every=0)
    config.log.update(every=1, pictures_every=steps)
