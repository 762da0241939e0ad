"""Who imports whom: the layers of the house, read from the source."""

import ast
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "gigatok_jax"
BASE = {"errors", "model_config", "files"}  # anybody may
# What a module or folder of gigatok_jax may import from the others; one not listed may import
# anything but conversion and benchmarks.
ALLOWED = {
    "errors": set(),
    "model_config": {"errors"},
    "files": {"errors"},
    "command_line": {"errors"},
    "ops": {"errors"},
    "losses": {"errors", "ops"},
    "models": BASE | {"ops"},
    "data": BASE,
    "sampling": BASE | {"ops", "models"},
    "parallel": BASE | {"ops"},
    "run": BASE | {"parallel"},
    "checkpoint": BASE | {"parallel", "processes"},
    "metric_writer": BASE | {"parallel"},
    "model_card": BASE,
}
LOADER = "load.py"  # the one way to conversion, for the public load_*


def imports(path):
    """Dotted names a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parts_used(path):
    """Modules and folders of gigatok_jax that a file imports."""
    names = [name.split(".") for name in imports(path)]
    return {name[1] for name in names if name[0] == "gigatok_jax" and len(name) > 1}


@pytest.mark.parametrize("part", ALLOWED)
def test_parts_import_only_what_lies_below(part):
    files = [PACKAGE / f"{part}.py", *(PACKAGE / part).glob("**/*.py")]
    for path in filter(pathlib.Path.exists, files):
        assert parts_used(path) <= ALLOWED[part] | {part}, path


def test_nothing_imports_conversion_benchmarks_or_tests():
    for path in [ROOT / "main.py", *PACKAGE.glob("**/*.py")]:
        first = path.relative_to(ROOT).parts[1:2]
        if first in (("conversion",), ("benchmarks",)) or path.name == LOADER:
            continue
        banned = ("gigatok_jax.conversion", "gigatok_jax.benchmarks", "tests")
        assert not {name for name in imports(path) if name.startswith(banned)}, path


def test_run_needs_no_torch_and_no_tensorflow():
    for path in [ROOT / "main.py", *PACKAGE.glob("**/*.py"), *(ROOT / "configs").glob("*.py")]:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"torch", "tensorflow", "torchvision"}, path


def test_transforms_and_config_tables_stay_off_jax():
    for path in (PACKAGE / "model_config.py", *PACKAGE.glob("data/transforms.py")):
        assert "jax" not in {name.split(".")[0] for name in imports(path)}, path


def test_import_sets_no_flags_and_no_jax_config():
    code = (
        "from absl import flags; import jax, ml_collections; before = dict(jax.config.values);"
        "known = set(flags.FLAGS); import gigatok_jax;"
        "assert dict(jax.config.values) == before and set(flags.FLAGS) == known"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


OUTSIDE = """
import pathlib
import gigatok_jax, jax, jax.numpy as jnp, numpy as np
from gigatok_jax.models import tokenizer

root = pathlib.Path(gigatok_jax.__file__).parent
assert (root / "py.typed").exists() and "site-packages" in str(root)
size = {"encoder": "pico", "decoder": "pico", "stem": "patch", "image_size": 64}
model = gigatok_jax.model_config("S-S", latent_tokens=16, align_block=0, **size)
images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
params = tokenizer.make(model).init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
made = gigatok_jax.Tokenizer(params, model)
made.save("saved", licence="mit")
again = gigatok_jax.load_tokenizer("saved")
np.testing.assert_array_equal(again.encode(images), made.encode(images))
assert gigatok_jax.to_uint8(again.decode(again.encode(images))).shape == images.shape
"""


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(tmp_path):
    """Built from the checkout, installed with what it requires, used somewhere else."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    away = shutil.ignore_patterns(".*", "build", "runs", "tests", "*.egg-info")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=away)  # pip builds in the folder
    wheel = [python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source]
    subprocess.run(wheel, check=True)
    (built,) = tmp_path.glob("gigatok_jax-*.whl")
    subprocess.run([python, "-m", "pip", "install", "-q", built], check=True)
    subprocess.run([python, "-c", OUTSIDE], check=True, cwd=tmp_path)
