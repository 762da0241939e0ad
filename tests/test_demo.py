"""The demo: its stages find each other, and its judge can tell digits apart."""

import json
import pathlib
import subprocess
import sys

import pytest

from configs import demo as config_file
from gigatok_jax.run import pictures
from gigatok_jax.train import demo

ROOT = pathlib.Path(__file__).parents[1]


def test_each_stage_reads_what_the_ones_before_leave(tmp_path):
    stages = demo.connect(config_file.get_config(), tmp_path)
    assert tuple(stages) == demo.STAGES
    assert stages.codes.checkpoint == stages.prior.tokenizer == str(tmp_path)
    assert stages.prior.codes == str(tmp_path / "codes")
    assert (stages.samples.prior, stages.samples.tokenizer) == (
        str(tmp_path / "prior"),
        str(tmp_path),
    )


def test_stages_fit_each_other():
    config = config_file.get_config()
    model, prior = config.model, config.stages.prior.model
    assert (prior.vocab, prior.tokens) == (model.codebook_size, model.latent_tokens)
    for stage in (config.stages.codes, config.stages.prior):
        assert stage.data.source == config.data.source == "digits"


@pytest.mark.parametrize(("shift", "low", "high"), [(0, 0.9, 1.0), (1, 0.0, 0.1)])
def test_the_judge_reads_digits(tmp_path, shift, low, high):
    """Held-out real digits stand in for generated ones, under their names and under others."""
    config = config_file.get_config()
    (tmp_path / "images").mkdir()
    images, labels = demo.digits(config, "held_out")
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = f"{i:06d}_{(label + shift) % 10:03d}_{label}.png"
        (tmp_path / "images" / name).write_bytes(pictures.encode(image))
    found = demo.recognition(config, tmp_path)
    assert low <= found["recognised_generated"] <= high
    assert found["recognised_real"] > 0.9
    if shift == 0:
        assert found["recognised_generated"] == found["recognised_real"]


@pytest.mark.slow
def test_one_command_shows_the_method_and_repeats_nothing(tmp_path):
    command = [
        sys.executable,
        "main.py",
        "--config=configs/demo.py:smoke",
        "--workdir=" + str(tmp_path),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["step"] == 200 and results["prior/step"] == 50
    assert results["samples/images"] == 20 and results["recognised_real"] > 0.9
    assert "Generated images" in (tmp_path / "index.html").read_text()
    again = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "images/s" not in again.stdout
    assert json.loads((tmp_path / "results.json").read_text()) == results
