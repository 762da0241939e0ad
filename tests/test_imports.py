"""Who imports whom: the layers of the house, read from the source."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "gigatok_jax"
# Every file and folder of the package, lowest first: each imports from those on earlier lines and
# from itself. Names on one line know nothing of each other.
FLOORS = (
    "errors",
    "files trees",
    "model_config",
    "ops losses",
    "data models parallel",
    "run sampling",
    "weights",
    "library",
    "evaluation",
    "train",
    "planning conversion",
    "benchmarks",
    "__init__ __main__",
)


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


def module(name):
    """The module that an imported name is or lies in; None outside the package."""
    words = name.split(".")
    while words and words[0] == PACKAGE.name:
        path = ROOT.joinpath(*words)
        if path.with_suffix(".py").exists():
            return ".".join(words)
        if (path / "__init__.py").exists():
            return ".".join([*words, "__init__"])
        words.pop()
    return None


def modules():
    """Every module of the package with the modules it imports."""
    found = {}
    for path in PACKAGE.glob("**/*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name] = {used for used in map(module, imports(path)) if used} - {name}
    return found


def part(name):
    return name.split(".")[1]


HEIGHTS = {part: height for height, row in enumerate(FLOORS) for part in row.split()}


def test_every_file_and_folder_has_its_floor():
    assert set(HEIGHTS) == {part(name) for name in modules()}


def test_nothing_is_imported_from_the_same_floor_or_above():
    upward = set()
    for name, used in modules().items():
        for other in used:
            ours, theirs = part(name), part(other)
            library = theirs == "__init__"  # the public names, for what stands on all floors
            if ours != theirs and not library and HEIGHTS[theirs] >= HEIGHTS[ours]:
                upward.add((name, other))
    assert not upward


def test_no_two_files_import_each_other_in_a_circle():
    left = modules()
    while free := {name for name, used in left.items() if not used & set(left)}:
        left = {name: used for name, used in left.items() if name not in free}
    assert not left, f"in circles: {sorted(left)}"


def test_the_root_holds_few_modules():
    loose = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert len(loose) <= 9, loose


def test_run_needs_no_torch_and_no_tensorflow():
    for path in [ROOT / "main.py", *PACKAGE.glob("**/*.py"), *(ROOT / "configs").glob("*.py")]:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"torch", "tensorflow", "torchvision"}, path


NAMES = {"absl-py": "absl", "pillow": "PIL", "orbax-checkpoint": "orbax", "scikit-learn": "sklearn"}
LATER = {"tensorflow-datasets"}


def test_what_is_required_is_imported_and_what_is_imported_is_required():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.split(r"[\[>=;]", line)[0] for line in lines if line and line[0] != "#"} - LATER
    files = [ROOT / "main.py", *PACKAGE.glob("**/*.py"), *(ROOT / "configs").glob("*.py")]
    roots = {name.split(".")[0] for path in files for name in imports(path)}
    known = sys.stdlib_module_names | {PACKAGE.name, "configs", "orbax"}
    libtpu = {"libtpu"}  # looked for, and named where it is missing
    assert {NAMES.get(name, name) for name in required} - {"orbax"} == roots - known - libtpu


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
import re
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
