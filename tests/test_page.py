"""The page of a run opens from disk and shows what the files of the run say."""

import html.parser
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from gigatok_jax import files
from gigatok_jax.run import charts, page, pictures


class Page(html.parser.HTMLParser):
    """Tags with attributes, visible text, and a check that tags close in order."""

    VOID = ("meta", "img", "line", "circle", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]


def load(workdir):
    return Page(page.write(workdir).read_text())


def write_rows(workdir, rows):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    """A workdir as a finished run of 400 steps leaves it."""
    rows = [{"step": s, "train/loss": math.exp(-s / 50), "train/gap": 1.0} for s in range(1, 401)]
    rows[99]["train/gap"] = None
    rows += [{"step": s, "eval/psnr": s / 20, "train/odd_one": 3} for s in (200, 400)]
    rows += [{"step": 400, "time/data_share": 0.25, "time/compute_share": 0.75}]
    write_rows(tmp_path, rows)
    config = {"name": "demo <&>", "task": "train_tokenizer", "train": {"steps": 400}}
    files.write_json(tmp_path / "config.json", config)
    files.write_json(tmp_path / "results.json", {"step": 400, "psnr": 20.125, "other": 3})
    for step in (200, 400):
        pictures.save(tmp_path, "reconstruction", step, np.zeros((8, 8, 3), np.uint8))
    return tmp_path


def test_page_shows_status_figures_config_and_every_curve(run):
    shown = load(run)
    for words in ("demo <&>", "finished at step 400", "20.12", "train.steps", "odd one"):
        assert words in shown.text
    titles = [a["aria-label"] for a in shown.all("svg")]
    assert titles == ["psnr", "loss", "share", "gap", "odd_one"]


def test_page_needs_no_network_and_its_pictures_are_there(run):
    shown = load(run)
    for _, attributes in shown.tags:
        for name in ("src", "href"):
            if name in attributes:
                assert (run / attributes[name]).is_file()
    text = (run / "index.html").read_text().replace("http://www.w3.org/2000/svg", "")
    assert "://" not in text and "@import" not in text


def test_newest_picture_comes_first(run):
    assert [a["src"] for a in load(run).all("img")] == [
        "pictures/reconstruction_00000400.png",
        "pictures/reconstruction_00000200.png",
    ]


def test_a_curve_passes_through_its_points(tmp_path):
    rng = np.random.default_rng(0)
    steps, values = np.sort(rng.choice(1000, 40, replace=False)) + 1, rng.uniform(1, 3, 40)
    write_rows(
        tmp_path,
        [{"step": int(s), "a/x": v} for s, v in zip(steps, values, strict=True)],
    )
    path = load(tmp_path).all("path")[0]["d"]
    x, y = np.array(re.findall(r"([\d.]+) ([\d.]+)", path), float).T
    # Affine in step and in value: the drawing keeps every ratio of distances, y pointing down.
    assert np.corrcoef(x, steps)[0, 1] > 1 - 1e-5
    assert np.corrcoef(y, values)[0, 1] < -1 + 1e-5
    assert x.min() >= charts.LEFT and x.max() <= charts.WIDTH - charts.RIGHT + 0.05
    assert y.min() >= charts.TOP and y.max() <= charts.HEIGHT - charts.BOTTOM


def test_a_value_that_was_not_finite_leaves_a_gap(tmp_path):
    write_rows(tmp_path, [{"step": s, "a/x": None if s == 5 else float(s)} for s in range(1, 10)])
    assert load(tmp_path).all("path")[0]["d"].count("M") == 2


def test_a_chart_of_its_own_draws_every_line_and_leaves_gaps():
    lines = {"a<b": [(1, 0.5), (2, math.nan), (3, 0.1)], "never finite": [(1, math.nan)]}
    text = charts.svg_file(lines)
    assert "nan" not in text and text.count("<circle") == 2  # a point on each side of the gap
    root = ElementTree.fromstring(text)
    assert {"a<b", "never finite"} <= {element.text for element in root.iter()}


def test_long_runs_are_thinned_without_losing_their_mean():
    values = np.random.default_rng(0).normal(size=12_000)
    thin = charts._thin(list(enumerate(values)))
    assert len(thin) <= charts.POINTS
    assert np.mean([y for _, y in thin]) == pytest.approx(values.mean())
    assert thin[-1][0] == 11_999


@pytest.mark.parametrize("low, high, log", [(0, 1, False), (-3, 17, False), (2.1, 2.2, False)])
def test_ticks_are_round_and_inside(low, high, log):
    ticks = list(charts._ticks(low, high, log))
    assert 3 <= len(ticks) <= 6
    assert min(ticks) >= low - 1e-9 and max(ticks) <= high + 1e-9
    assert all(len(f"{t:.6g}".lstrip("-").replace(".", "").strip("0")) <= 3 for t in ticks)


@pytest.mark.parametrize("value", [0.0, -2.5, 1e-12, 1e12, 7.0])
def test_a_constant_draws(tmp_path, value):
    write_rows(tmp_path, [{"step": s, "a/x": value} for s in (1, 2)])
    assert len(load(tmp_path).all("svg")) == 1


def test_an_interrupted_run_says_where_it_stopped(run):
    with (run / "metrics.jsonl").open("a") as file:  # resumed to 1000 steps, stopped at 650
        file.write('{"step": 650, "train/loss": 1}\n{"step": 66')
    files.write_json(run / "config.json", {"train": {"steps": 1000}})
    assert "stopped at step 650 of 1,000" in load(run).text


def test_an_empty_workdir_still_gives_a_page(tmp_path):
    assert "stopped at step 0" in load(tmp_path).text


CFG = {"scale": 1.5, "schedule": "step", "start": 0.25, "end": 1.0, "interval": -1}
TILE = np.zeros((8, 8, 3), np.uint8)


def make_samples(workdir, classes=3):
    config = {"name": "pets", "task": "generate", "cfg": CFG, "temperature": 1.0, "top_k": 0}
    workdir.mkdir(exist_ok=True)
    files.write_json(workdir / "config.json", config)
    for i in range(classes):
        pictures.save_class(workdir, i * 7, f"house_cat_{i}", TILE)


def make_prior(workdir):
    workdir.mkdir(exist_ok=True)
    sample = {"cfg_scale": 1.0, "cfg_schedule": "linear", "cfg_start": 0.0, "top_k": 9}
    config = {"name": "ar", "task": "train_prior", "train": {"steps": 9}, "sample": sample}
    files.write_json(workdir / "config.json", config)
    rows = [{"step": s, "train/loss": 9.0 / s, "train/perplexity": 3.0} for s in range(1, 10)]
    write_rows(workdir, [*rows, {"step": 9, "eval/loss": 1.5}])
    for step in (5, 9):
        pictures.save(workdir, "samples", step, TILE)


def test_generated_classes_stand_in_their_order_beside_their_names(tmp_path):
    make_samples(tmp_path, 20)
    shown = load(tmp_path)
    assert "not finished" in shown.text and "133 house cat 19" in shown.text
    assert [a["src"] for a in shown.all("img")][:3] == [
        "pictures/class_0000_house_cat_0.png",
        "pictures/class_0007_house_cat_1.png",
        "pictures/class_0014_house_cat_2.png",
    ]
    assert f"{20 - page.SHOWN} more classes" in shown.text
    files.write_json(tmp_path / "results.json", {"images": 1234, "classes": 20, "cfg_scale": 1.5})
    shown = load(tmp_path)
    assert "1,234 images of 20 classes" in shown.text and "finished" in shown.text
    words = "Guidance scale 1.5, schedule step, 0.25 to 1 of the sequence, temperature 1."
    assert words in shown.text


def test_a_prior_shows_both_losses_in_one_chart_and_its_samples(tmp_path):
    make_prior(tmp_path)
    shown = load(tmp_path)
    assert [a["aria-label"] for a in shown.all("svg")] == ["loss", "perplexity"]
    assert set(json.loads(shown.all("svg")[0]["data-chart"])["lines"]) == {"train", "eval"}
    assert [a["src"] for a in shown.all("img")] == [
        "pictures/samples_00000009.png",
        "pictures/samples_00000005.png",
    ]
    assert "Guidance scale 1, schedule linear, top-k 9." in shown.text  # which has no window
    assert "Codebook" not in shown.text
    config = files.read_json(tmp_path / "config.json")
    config["sample"] |= {"cfg_schedule": "step", "cfg_start": 0.18}
    files.write_json(tmp_path / "config.json", config)
    assert "schedule step, 0.18 to 1 of the sequence, top-k 9." in load(tmp_path).text


def test_runs_inside_a_run_have_their_part_of_its_page(run):
    make_prior(run / "prior")
    page.write(run / "prior")
    shown = load(run)
    assert "prior stopped at step 9 of 9" in shown.text
    files.write_json(run / "prior" / "results.json", {"step": 9, "loss": 1.25})
    make_samples(run / "samples")
    assert "samples not finished" in load(run).text
    files.write_json(run / "samples" / "results.json", {"images": 4, "classes": 3, "cfg_scale": 1})
    results = {"step": 400, "recognised_generated": 0.875, "prior/loss": 1.25}
    files.write_json(run / "results.json", results)
    shown = load(run)
    places = [shown.text.index(f"{word} ") for word in ("demo <&>", "Samples", "Prior")]
    assert places == sorted(places) and shown.text.index("Tokenizer") > places[-1]
    assert shown.text.count("1.250") == 1 and "88%" in shown.text
    assert "finished at step 400" in shown.text
    sources = [a["src"] for a in shown.all("img")]
    assert sources[0] == "samples/pictures/class_0000_house_cat_0.png"
    assert sources[-1] == "pictures/reconstruction_00000200.png"
    for source in [*sources, *(a["href"] for a in shown.all("a"))]:
        assert (run / source).is_file()
