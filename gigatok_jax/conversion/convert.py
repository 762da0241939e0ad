"""From one checkpoint to another: what the commands `from_torch` and `to_torch` do."""

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

# What PyTorch's AdamW keeps with each group of parameters beside its own settings.
GROUP = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
# Fields of a model that names and shapes do not show, so that a run's config says them.
HIDDEN = ("l2_norm", "rotation", "align_block", "query_init", "latent_tokens", "heads", "tokens")
OTHER_FILES = (".pt", ".pth", ".bin", ".ckpt", ".npz", ".msgpack")  # what no workdir is called
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
    """Converts a checkpoint to a `.safetensors`, or to a workdir that a run goes on in.

    Args:
        source: of any format.
        out: ends in `.safetensors`, or is the folder of a run.
        weights: for `.safetensors`, see `read.read`.
        overrides: fields of the model's config in the place of what is recognised.
        config: the run's config file, with its arguments after a colon; for a workdir.
        tokenizer_path: whose codes a prior learned; for a workdir.

    Raises:
        CheckpointError: the source is damaged or does not fit, or `out` is there already.
    """
    target = epath.Path(out).expanduser().absolute()  # Orbax wants it so
    _check_free(target)
    found = run_state.load(source)
    if target.suffix == ".safetensors":
        _weights_only(read.read(source, weights, **overrides or {}), target)
        return
    if target.suffix in OTHER_FILES:
        raise ConfigError(f"{out}: from_torch writes .safetensors or a workdir without a suffix")
    _to_workdir(found, target, overrides or {}, config, tokenizer_path)


def to_torch(source: str, out: str, *, weights: str = "auto", **overrides) -> None:
    """Converts a checkpoint to a `.pt` or a `.safetensors` under the original's names.

    A `.pt` of a run of ours holds what the original's trainer resumes from.

    Args, Raises: as of `from_torch`.
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


def _weights_only(found: read.Weights, target: epath.Path) -> None:
    state = found.state.promises
    progress = count_bytes(target.name, nbytes(state.values()))
    extras = {name: found.extras[name] for name in ("step", "weights", "tokenizer")}
    write.write_safetensors(target, state, found.config, progress, **extras)
    print(f"{target}: {describe(found.config)}, {found.extras['weights']} weights")


def nbytes(arrays: Iterable) -> int:
    """Bytes of arrays and promises."""
    return sum(array.nbytes for array in arrays)


def describe(model) -> str:
    """A model in a few words."""
    name = recognise.published_name(model)
    count = sum(
        Promise(shape, None, None).size for shape in recognise.tensor_shapes(model).values()
    )
    what = "prior" if model.kind == "prior" else f"{model.kind} tokenizer"
    return f"{name or what} of {count / 1e6:.1f}M numbers"


# A run of ours.


def _to_workdir(found, target: epath.Path, overrides, config_path: str, tokenizer_path: str):
    run = command_line.load_config(config_path) if config_path else None
    told = {name: run.model[name] for name in HIDDEN if name in run.model} if run else {}
    model = read.config_of(found, **told | overrides)
    if run is not None:
        _check_same(model, run.model, found.path)
    parts = dict(found.parts)
    for part in read.COPIES:
        if part in parts:
            parts[part] = read.checked(found, part, model)
    fallback = run.loss.discriminator if run and "loss" in run else "patchgan"
    arrays = run_state.to_ours(
        parts, found.optimizers, found.step or 0, model,
        seed=run.seed if run else 0, fallback=fallback,
        first_moment=run.optim.first_moment if run else "float32",
    )  # fmt: skip
    extras = {
        "config": run.to_dict() if run else {"model": model.to_dict()},
        "data": {"fingerprint": ""},
        "groups": _settings(found.optimizers),
    }
    if model.kind == "prior":
        extras |= _prior_extras(found, tokenizer_path)
    progress = count_bytes(target.name, nbytes(arrays.values()))
    with write.draft(target) as draft:
        orbax_file.write(draft, found.step or 0, arrays, extras, progress)
        if run:
            files.write_json(draft / "config.json", run.to_dict())
    print(f"{target}: {describe(model)} at step {found.step or 0}; resume it with")
    print(f"  python main.py --config={config_path or 'configs/<run>.py'} --workdir={target}")


def _check_same(found, run, path: str) -> None:
    """Raises CheckpointError when tensors are of another model than a run's config."""
    differ = [f"{k} {found[k]!r} not {run.get(k)!r}" for k in found if found[k] != run.get(k)]
    if differ:
        raise CheckpointError(f"{path} is of another model than the config: {', '.join(differ)}")


def _prior_extras(found, tokenizer_path: str) -> dict[str, Any]:
    fingerprint = found.extras.get("tokenizer", "")
    if tokenizer_path:
        weights = read.read(tokenizer_path)
        params = tokenizer.from_torch(weights.state, weights.config)
        fingerprint = library.fingerprint({name: params[name] for name in library.CODE_PARTS})
    elif not fingerprint:
        print("whose codes it learned is not known: to resume it, convert with --tokenizer=PATH")
    return {"tokenizer": fingerprint, "class_names": [], "decay_from": None}


def _settings(optimizers: Mapping[str, dict]) -> dict[str, list[dict]]:
    """Plain numbers of each optimizer's groups, kept so that they can go back."""
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


def _to_pt(found, target: epath.Path, weights: str, overrides) -> None:
    model = read.config_of(found, **overrides)
    copies = [part for part in read.COPIES if part in found.parts]
    if weights != "auto" or not found.optimizers:
        copies = [read.choose(found, weights)]
    saved = {part: read.checked(found, part, model) for part in copies}
    if len(copies) == 1:
        saved = {"model": saved[copies[0]]}
    if weights == "auto":
        saved |= _rest(found, model)
    if found.step is not None:
        saved["steps"] = found.step
    progress = count_bytes(target.name, nbytes(_tensors(saved)))
    write.write_pt(target, saved, progress)
    print(f"{target}: {describe(model)}, {', '.join(saved)}")


def _rest(found, model) -> dict[str, Any]:
    """What the original resumes with beside the parameters."""
    kind = family(model)
    rates = _rates(found, kind)
    saved = {}
    for name, optimizer in found.optimizers.items():
        old = found.extras.get("groups", {}).get(name, [])
        groups = [
            _group(found, kind, rates.get(name), i, old) | dict(group)
            for i, group in enumerate(run_state.groups_of(optimizer, name))
        ]
        saved[name] = {"state": optimizer["state"], "param_groups": groups}
    if "discriminator" in found.parts:
        saved["discriminator"] = found.parts["discriminator"]
    return saved


def _group(found, kind: str, rate: float | None, i: int, old: list[dict]) -> dict[str, Any]:
    """Settings of one group: the run's, or else those of the file that it came from."""
    published, decay = PUBLISHED[kind]
    settings = {"lr": published, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
    run = found.extras.get("config", {}).get("optim")
    if run:
        betas = (run["beta1"], run["beta2"])
        settings |= {"lr": rate, "betas": betas, "weight_decay": run["weight_decay"]}
    if kind == "prior" and i:
        settings["weight_decay"] = 0.0
    if i < len(old) and not run:
        settings |= {k: tuple(v) if isinstance(v, list) else v for k, v in old[i].items()}
    return settings | {name: value for name, value in GROUP.items() if name not in settings}


def _rates(found, kind: str) -> dict[str, float]:
    """Learning rate of the next update of each optimizer, when the run's config is known."""
    config = ml_collections.ConfigDict(found.extras.get("config", {}))
    if "optim" not in config:
        return {}
    if kind == "tokenizer":
        made = tokenizer_run.make_optimizers(config)
        rates = {"optimizer": made.rate, "optimizer_disc": made.discriminator_rate}
    else:
        total, epoch = settings.total_steps(config), settings.steps_per_epoch(config)
        start = found.extras.get("decay_from")
        rates = {"optimizer": optim.learning_rate(config.optim, total, epoch, decay_from=start)}
    return {name: float(rate(found.step)) for name, rate in rates.items()}


def _tensors(saved: Any) -> Iterable:
    if isinstance(saved, dict):
        return itertools.chain.from_iterable(map(_tensors, saved.values()))
    return [saved] if hasattr(saved, "nbytes") else []


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Fields and values of NAME=VALUE texts."""
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
