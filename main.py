r"""Runs what a config describes: trains, extracts codes, generates, evaluates, plans.

python main.py --config=configs/<run>.py[:arg=value,...] [--workdir=DIR]
    [--config.any.key=value ...] [--dry_run]
"""

import importlib
import os

from absl import app, flags
from etils import epath
from ml_collections import config_flags

from gigatok_jax import errors
from gigatok_jax.run import command_line

config_flags.DEFINE_config_file("config", None, "configs/<run>.py[:arg=value,...]")
flags.DEFINE_string("workdir", None, "Where the run is kept; runs/<config name> by default.")
flags.DEFINE_bool("dry_run", False, "Prints what the run would hold, need and send.")

TASKS = {  # config.task: module and function of (config, workdir)
    "demo": ("gigatok_jax.train.demo", "train"),
    "evaluate": ("gigatok_jax.evaluation.prior_loss", "evaluate"),
    "extract_codes": ("gigatok_jax.train.extract_codes", "extract"),
    "generate": ("gigatok_jax.evaluation.generation", "generate"),
    "reconstruct": ("gigatok_jax.evaluation.reconstruction", "reconstruct"),
    "train_prior": ("gigatok_jax.train.ar", "train"),
    "train_tokenizer": ("gigatok_jax.train.tokenizer", "train"),
}


def main(argv):
    """Runs the task of the config or, with `--dry_run`, prints its plan."""
    del argv
    config = flags.FLAGS.config
    workdir = flags.FLAGS.workdir or f"runs/{config.name}"
    with command_line.one_line_errors():
        errors.one_of("task", config.task, TASKS)
        spread_over_cores(config)
        if flags.FLAGS.dry_run:
            from gigatok_jax.planning import report

            report.show(config)
        else:
            # Once inside a cluster, a process that fails has its own way to end.
            one_line, folder = command_line.one_line_errors(), command_line.folder_errors(workdir)
            with cluster_of(config, workdir), one_line, folder:
                module, function = TASKS[config.task]
                getattr(importlib.import_module(module), function)(config, workdir)
                print_results(workdir)


def print_results(workdir):
    """Prints `results.json` of a finished task from its workdir, if the file exists."""
    from gigatok_jax.run import processes

    results = epath.Path(workdir) / "results.json"
    if processes.is_first() and results.exists():  # an interrupted run has none yet
        print(results.read_text().strip())


def spread_over_cores(config):
    """Makes several jax devices of one CPU, if the config asks: small steps then use more cores."""
    if config.get("mesh") and config.mesh.cpu_devices != 1:
        import jax

        cores = 1 << min(os.cpu_count(), 8).bit_length() - 1  # a power of two divides the batch
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices or cores)


def cluster_of(config, workdir):
    """Returns a context that joins a cluster where there is one.

    Also prints the workdir, and keeps compiled programs between runs.
    """
    import jax

    from gigatok_jax.run import cluster

    print(f"workdir: {workdir}", flush=True)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.path.expanduser("~/.cache/gigatok_jax/compiled")
        jax.config.update("jax_compilation_cache_dir", cache)
    return cluster.joined(config, workdir)


if __name__ == "__main__":  # Grain's worker processes import this file
    app.run(main, flags_parser=command_line.parse_flags)
