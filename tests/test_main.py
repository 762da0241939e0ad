"""The command line: one line and exit status 1 for every mistake, and the dry run."""

import pathlib
import subprocess
import sys

import pytest

from gigatok_jax import errors, model_config
from gigatok_jax.models import parameters
from gigatok_jax.run import command_line
from gigatok_jax.trees import flatten

ROOT = pathlib.Path(__file__).parents[1]


def run_main(*arguments):
    command = [sys.executable, "main.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_main_is_short():
    assert len((ROOT / "main.py").read_text().splitlines()) < 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no config given; try --config=configs/demo.py"),
        (["--confg=configs/ss.py"], "--confg is not an option"),
        (["--config=README.md"], "README.md is no config: SyntaxError"),
        (
            ["--config=configs/ss.py:smoke", "--config.task=trian"],
            "task is 'trian', expected one of",
        ),
        (["--config=configs/xlxl.py"], "did you mean 'configs/xlxxl.py'"),
        (["--config=configs/ss.py:smok"], "did you mean 'smoke'"),
        (["--config=configs/ss.py", "--config.train.stesp=3"], "did you mean 'train.steps'"),
        (["--config=configs/ss.py", "--config.train.steps=x"], "'x', expected int like 0"),
        (["--config=configs/ss.py", "--config.optim.clip=x"], "'x', expected float like 10.0"),
        (["--config=configs/ss.py", "--config.data.flip=maybe"], "data.flip=maybe"),
        (["--config=configs/ss.py", "--wokdir=x"], "workdir"),
        (["--config=configs/ss.py", "train.steps=3"], "'train.steps=3' is not an option"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    result = run_main(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_help_is_no_mistake():
    result = run_main("--help")
    assert result.returncode == 0 and "--[no]dry_run" in result.stdout


def test_a_mistake_in_a_modules_arguments_is_one_line():
    command = [sys.executable, "-m", "gigatok_jax.conversion", "fromtorch", "a"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ") and "'from_torch'" in result.stderr


def test_dry_run_sees_overrides():
    arguments = ["--config=configs/ss.py:smoke", "--config.model.codebook_size=128"]
    result = run_main(*arguments, "--dry_run")
    assert result.returncode == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if "quantizer/codebook" in line)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["quantizer/codebook", "(128, 8)", "float32", "1,024"]


def test_dry_run_refuses_a_model_that_cannot_be_built():
    arguments = ["--config=configs/ss.py", "--config.model.latent_tokens=100", "--dry_run"]
    result = run_main(*arguments)
    assert result.returncode == 1
    assert result.stderr == "error: model.latent_tokens is 100, expected a power of two\n"


def test_dry_run_of_a_scanned_stack_is_one_row():
    params = parameters.abstract_params(model_config("XL-XXL"))
    kernel = flatten(params)["encoder/blocks/mlp/up/kernel"]
    assert kernel.shape == (36, 1280, 5120)
    assert parameters.count(kernel) == 36 * 1280 * 5120


def test_the_library_error_is_named_even_when_wrapped(capsys):
    with pytest.raises(SystemExit) as ended, command_line.one_line_errors(ValueError):
        try:
            raise errors.ConfigError("what was\ngiven")
        except errors.ConfigError as error:
            raise ValueError("parsing failed") from error
    assert ended.value.code == "error: what was given"


def test_what_an_error_adds_to_the_one_before_is_told():
    with pytest.raises(SystemExit) as ended, command_line.one_line_errors():
        try:
            raise errors.CheckpointError("is cut short")
        except errors.CheckpointError as error:
            raise errors.CheckpointError(f"a.pt: {error}") from None
    assert ended.value.code == "error: a.pt: is cut short"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NotADirectoryError(20, "Not a directory", "runs/a/b"), "runs/a/b: Not a directory; "),
        (OSError(28, "No space left on device"), "runs/a: No space left on device; "),
    ],
)
def test_a_workdir_that_cannot_be_written_is_one_line(error, told):
    with (
        pytest.raises(errors.ConfigError, match=f"{told}--workdir=DIR names another folder"),
        command_line.folder_errors("runs/a"),
    ):
        raise error


def test_files_elsewhere_are_none_of_the_workdirs():
    with pytest.raises(FileNotFoundError), command_line.folder_errors("runs/a"):
        raise FileNotFoundError(2, "No such file or directory", "runs/ab")


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), command_line.one_line_errors():
        1 / 0  # noqa: B018
