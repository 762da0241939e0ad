"""Converts one checkpoint to another: the commands `from_torch` and `to_torch`."""

import ast
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections
from etils import epath

from gigatok_jax import files, library
from gigatok_jax.conversion import run_state, tokenizer
from gigatok_jax.errors import CheckpointError, ConfigError
from gigatok_jax.model_config import family
from gigatok_jax.run import command_line
from gigatok_jax.run.metric_writer import count_bytes
from gigatok_jax.train import optim, settings
from gigatok_jax.train import tokenizer as tokenizer_run
from gigatok_jax.weights import orbax_file, read, recognise, write
from gigatok_jax.weights.names import Promise

# Settings that AdamW of PyTorch keeps with each parameter group beside those of the run.
GROUP = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
# Fields of a model that names and shapes do not show: they come from the config of the run.
HIDDEN = ("l2_norm", "rotation", "align_block", "query_init", "latent_tokens", "heads", "tokens")
OTHER_FILES = (".pt", ".pth", ".bin", ".ckpt", ".npz", ".msgpack")  # suffixes that no workdir has
PUBLISHED = {"tokenizer": (1e-4, 1e-4), "prior": (1e-4, 0.05)}  # learning rate, weight decay


def from_torch(
    source: str,
    out: str,
    *,
    weights: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    config: str = "",
    tokenizer_path: str = "",
) -> None:
    """Converts a checkpoint to a `.safetensors`, or to a workdir in which a run continues.

    Args:
        source: path of a checkpoint of any format.
        out: path that ends in `.safetensors`, or the folder of a run.
        weights: copy to write to a `.safetensors`, see `read.read`.
        overrides: values of fields of the model's config, instead of the recognised values.
        config: config file of the run, with its arguments after a colon; for a workdir.
        tokenizer_path: checkpoint of the tokenizer whose codes a prior learned; for a workdir.

    Raises:
        CheckpointError: the source is damaged or does not fit, or `out` exists.
        ConfigError: `out` has another suffix, or an override cannot work.
    """
    target = epath.Path(out).expanduser().absolute()  # Orbax wants it so
    _check_free(target)
    opened = run_state.load(source)
    if target.suffix == ".safetensors":
        _weights_only(read.read(source, weights, **overrides or {}), target)
        return
    if target.suffix in OTHER_FILES:
        raise ConfigError(f"{out}: from_torch writes .safetensors or a workdir without a suffix")
    _to_workdir(opened, target, overrides or {}, config, tokenizer_path)


def to_torch(source: str, out: str, *, weights: str = "auto", **overrides) -> None:
    """Converts a checkpoint to a `.pt` or a `.safetensors` under the original's names.

    The trainer of the original resumes from a `.pt` of a whole run of ours. Arguments and
    exceptions are those of `from_torch`.
    """
    target = epath.Path(out).expanduser().absolute()  # Orbax wants it so
    _check_free(target)
    if target.suffix == ".safetensors":
        _weights_only(read.read(source, weights, **overrides), target)
    elif target.suffix == ".pt":
        _to_pt(run_state.load(source), target, weights, overrides)
    else:
        raise ConfigError(f"{out}: to_torch writes .pt or .safetensors")


def _check_free(target: epath.Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} is there already: remove it or choose another name")


def _weights_only(opened: read.Weights, target: epath.Path) -> None:
    state = opened.state.promises
    progress = count_bytes(target.name, nbytes(state.values()))
    extras = {name: opened.extras[name] for name in ("step", "weights", "tokenizer")}
    write.write_safetensors(target, state, opened.config, progress, **extras)
    print(f"{target}: {describe(opened.config)}, {opened.extras['weights']} weights")


def nbytes(arrays: Iterable) -> int:
    """Returns the number of bytes of all arrays and promises together."""
    return sum(array.nbytes for array in arrays)


def describe(model: ml_collections.ConfigDict) -> str:
    """Describes a model in a few words: its published name or kind, and its number of values."""
    name = recognise.published_name(model)
    count = sum(
        Promise(shape, None, None).size for shape in recognise.tensor_shapes(model).values()
    )
    what = "prior" if model.kind == "prior" else f"{model.kind} tokenizer"
    return f"{name or what} of {count / 1e6:.1f}M numbers"


# A run of ours.


def _to_workdir(opened, target: epath.Path, overrides, config_path: str, tokenizer_path: str):
    run = command_line.load_config(config_path) if config_path else None
    hidden = {name: run.model[name] for name in HIDDEN if name in run.model} if run else {}
    model = read.config_of(opened, **hidden | overrides)
    if run is not None:
        _check_same(model, run.model, opened.path)
    parts = dict(opened.parts)
    for part in read.COPIES:
        if part in parts:
            parts[part] = read.checked(opened, part, model)
    fallback = run.loss.discriminator if run and "loss" in run else "patchgan"
    arrays = run_state.to_ours(
        parts, opened.optimizers, opened.step or 0, model,
        seed=run.seed if run else 0, fallback=fallback,
        first_moment=run.optim.first_moment if run else "float32",
    )  # fmt: skip
    extras = {
        "config": run.to_dict() if run else {"model": model.to_dict()},
        "data": {"fingerprint": ""},
        "groups": _settings(opened.optimizers),
    }
    if model.kind == "prior":
        extras |= _prior_extras(opened, tokenizer_path)
    progress = count_bytes(target.name, nbytes(arrays.values()))
    with write.draft(target) as draft:
        orbax_file.write(draft, opened.step or 0, arrays, extras, progress)
        if run:
            files.write_json(draft / "config.json", run.to_dict())
    print(f"{target}: {describe(model)} at step {opened.step or 0}; resume it with")
    print(f"  python main.py --config={config_path or 'configs/<run>.py'} --workdir={target}")


def _check_same(opened, run, path: str) -> None:
    """Raises CheckpointError if a checkpoint's model differs from the model of a run's config."""
    differ = [f"{k} {opened[k]!r} not {run.get(k)!r}" for k in opened if opened[k] != run.get(k)]
    if differ:
        raise CheckpointError(f"{path} is of another model than the config: {', '.join(differ)}")


def _prior_extras(opened, tokenizer_path: str) -> dict[str, Any]:
    fingerprint = opened.extras.get("tokenizer", "")
    if tokenizer_path:
        weights = read.read(tokenizer_path)
        params = tokenizer.from_torch(weights.state, weights.config)
        fingerprint = library.fingerprint({name: params[name] for name in library.CODE_PARTS})
    elif not fingerprint:
        print("the tokenizer of this prior is not known: to resume, convert with --tokenizer=PATH")
    return {"tokenizer": fingerprint, "class_names": [], "decay_from": None}


def _settings(optimizers: Mapping[str, dict]) -> dict[str, list[dict]]:
    """Picks the settings of each optimizer's parameter groups that are plain JSON values.

    A converted run keeps the settings for a conversion back to the original.
    """
    plain = (int, float, bool, str, type(None))
    return {
        name: [
            {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in group.items()
                if isinstance(value, plain)
                or (isinstance(value, tuple) and all(isinstance(x, plain) for x in value))
            }
            for group in optimizer.get("param_groups", [])
        ]
        for name, optimizer in optimizers.items()
    }


# A file of the original.


def _to_pt(opened, target: epath.Path, weights: str, overrides) -> None:
    model = read.config_of(opened, **overrides)
    copies = [part for part in read.COPIES if part in opened.parts]
    if weights != "auto" or not opened.optimizers:
        copies = [read.choose(opened, weights)]
    saved = {part: read.checked(opened, part, model) for part in copies}
    if len(copies) == 1:
        saved = {"model": saved[copies[0]]}
    if weights == "auto":
        saved |= _rest(opened, model)
    if opened.step is not None:
        saved["steps"] = opened.step
    progress = count_bytes(target.name, nbytes(_tensors(saved)))
    write.write_pt(target, saved, progress)
    print(f"{target}: {describe(model)}, {', '.join(saved)}")


def _rest(opened, model) -> dict[str, Any]:
    """Collects the optimizers and the discriminator of a run, from which the original resumes."""
    kind = family(model)
    rates = _rates(opened, kind)
    saved = {}
    for name, optimizer in opened.optimizers.items():
        old = opened.extras.get("groups", {}).get(name, [])
        groups = [
            _group(opened, kind, rates.get(name), i, old) | dict(group)
            for i, group in enumerate(run_state.groups_of(optimizer, name))
        ]
        saved[name] = {"state": optimizer["state"], "param_groups": groups}
    if "discriminator" in opened.parts:
        saved["discriminator"] = opened.parts["discriminator"]
    return saved


def _group(opened, kind: str, rate: float | None, i: int, old: list[dict]) -> dict[str, Any]:
    """Returns the settings that PyTorch's AdamW keeps with a parameter group.

    The run's config decides, else the file that the run came from, else the published values.
    """
    published, decay = PUBLISHED[kind]
    settings = {"lr": published, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
    run = opened.extras.get("config", {}).get("optim")
    if run:
        betas = (run["beta1"], run["beta2"])
        settings |= {"lr": rate, "betas": betas, "weight_decay": run["weight_decay"]}
    if kind == "prior" and i:
        settings["weight_decay"] = 0.0
    if i < len(old) and not run:
        settings |= {k: tuple(v) if isinstance(v, list) else v for k, v in old[i].items()}
    return settings | {name: value for name, value in GROUP.items() if name not in settings}


def _rates(opened, kind: str) -> dict[str, float]:
    """Computes the learning rate of the next update of each optimizer, by the optimizer's name.

    The dict is empty if the config of the run is unknown.
    """
    config = ml_collections.ConfigDict(opened.extras.get("config", {}))
    if "optim" not in config:
        return {}
    if kind == "tokenizer":
        optimizers = tokenizer_run.make_optimizers(config)
        rates = {"optimizer": optimizers.rate, "optimizer_disc": optimizers.discriminator_rate}
    else:
        total, epoch = settings.total_steps(config), settings.steps_per_epoch(config)
        start = opened.extras.get("decay_from")
        rates = {"optimizer": optim.learning_rate(config.optim, total, epoch, decay_from=start)}
    return {name: float(rate(opened.step)) for name, rate in rates.items()}


def _tensors(saved: Any) -> Iterable:
    if isinstance(saved, dict):
        return itertools.chain.from_iterable(map(_tensors, saved.values()))
    return [saved] if hasattr(saved, "nbytes") else []


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Parses texts NAME=VALUE to a dict of Python values by name.

    Raises:
        ConfigError: a text has no "=".
    """
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} sets nothing, expected NAME=VALUE such as rotation=False")
        try:
            values[name] = ast.literal_eval(
                value.capitalize() if value in ("true", "false") else value
            )
        except (ValueError, SyntaxError):
            values[name] = value
    return values
