"""Cool-down of a prior: a run that starts from another run's checkpoint, its rate falling to 0."""

import math
from typing import Any

import ml_collections
from etils import epath

from gigatok_jax import files
from gigatok_jax.errors import CheckpointError, ConfigError
from gigatok_jax.run import checkpoint, processes
from gigatok_jax.train import optim
from gigatok_jax.train.loop import Run
from gigatok_jax.train.settings import steps_per_epoch, total_steps

COOLDOWN = "cooldown.json"  # where a cool-down branched off


def find_branch(
    config: ml_collections.ConfigDict, workdir: epath.Path, tokenizer: str
) -> dict[str, Any] | None:
    """Returns "checkpoint" and "step" that a cool-down starts from; None for other runs.

    The workdir of a cool-down that has begun keeps both, so that the run of the checkpoint may go
    on or disappear.

    Args:
        config: of the run.
        workdir: folder of the run.
        tokenizer: fingerprint of the tokenizer whose codes this run learns.

    Raises:
        CheckpointError: the checkpoint is of another model or tokenizer, or its learning rate is
            not the base rate.
        ConfigError: `train.steps` is not beyond the checkpoint's step.
    """
    if not config.cooldown_from:
        return None
    if (workdir / COOLDOWN).exists():
        return files.read_json(workdir / COOLDOWN)
    _, extras = checkpoint.load_params(config.cooldown_from, ())
    check_branch(config, extras, tokenizer)
    root, _ = checkpoint.find(config.cooldown_from)
    return {"checkpoint": str(root / str(extras["step"])), "step": extras["step"]}


def check_branch(config: ml_collections.ConfigDict, extras: dict[str, Any], tokenizer: str) -> None:
    """Checks that a cool-down of a config can start from a checkpoint, by what is saved beside it.

    Raises:
        CheckpointError: the checkpoint is of another model or tokenizer, or its learning rate is
            not the base rate.
        ConfigError: `train.steps` is not beyond the checkpoint's step.
    """
    saved, step, name = extras["config"], extras["step"], f"checkpoint {config.cooldown_from}"
    ours, theirs = config.model.to_dict(), saved["model"]
    if theirs != ours:
        names = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        differ = ", ".join(f"{key} {theirs.get(key)!r} not {ours.get(key)!r}" for key in names)
        raise CheckpointError(f"{name} is of another model: {differ}")
    if extras["tokenizer"] != tokenizer:
        raise CheckpointError(
            f"{name} learned codes of tokenizer {extras['tokenizer']}, these are of {tokenizer}"
        )
    saved = ml_collections.ConfigDict(saved)
    rate = optim.learning_rate(
        saved.optim, total_steps(saved), steps_per_epoch(saved), decay_from=extras["decay_from"]
    )
    if not math.isclose(rate(step), saved.optim.learning_rate):
        raise CheckpointError(
            f"{name} is not in a constant phase: its learning rate is {rate(step):.3g} and the base"
            f" {saved.optim.learning_rate:.3g}; choose an earlier step, or one after the warm-up"
        )
    if total_steps(config) <= step:
        raise ConfigError(
            f"train.steps is {total_steps(config)}, {name} is at step {step} already: set it beyond"
        )


def begin(run: Run, branch: dict[str, Any]) -> tuple[Any, int]:
    """Starts a cool-down: copies a checkpoint into its workdir; returns state and updates done."""
    state, _ = checkpoint.restore_from(branch["checkpoint"], run.program.abstract)
    if processes.is_first():
        files.write_json(run.workdir / COOLDOWN, branch)
        print(f"the rate falls from step {branch['step']} to {run.total_steps}", flush=True)
    run.writer.truncate_after(branch["step"])
    run.checkpoints.save(branch["step"], state, run.extras)
    return state, branch["step"]
