"""Writes the page of a run: one index.html, opened from disk, without a server or network.

Curves are SVG drawn here; the script on the page only shows the values under the pointer.
"""

import datetime
import fnmatch
import html
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from etils import epath

from gigatok_jax import files
from gigatok_jax.run import charts, metric_writer
from gigatok_jax.run.command_line import flatten

Figures = Mapping[str, Any]


class Section(NamedTuple):
    """Record of a section of a run's page: its title, its note and the patterns of its metrics.

    A metric belongs to the first section with a matching pattern.
    """

    title: str
    note: str
    patterns: tuple[str, ...]
    together: bool = False  # all metrics in one chart; otherwise one chart per name


PRIOR_LOSS = Section(
    "Loss",
    "Nats per code, and their exponential; lower is better.",
    ("*/loss", "*/loss_ema", "*perplexity"),
)
SECTIONS = (
    Section(
        "Quality on held-out images",
        "Averaged (EMA) weights. PSNR in dB and SSIM: higher is better; LPIPS: lower is better.",
        ("*/psnr", "*/ssim", "*/lpips"),
    ),
    Section(
        "Codebook",
        "Share of rows in use, perplexity of the choices, rows that nobody chose.",
        ("*/codebook_usage", "*/usage", "*perplexity", "*dead*"),
    ),
    Section("Losses", "Sums of the weighted terms, which stand under Other.", ("*loss*",)),
    Section(
        "Optimizer",
        "Learning rates; norms of gradients, updates and parameters.",
        ("*learning_rate*", "*norm*", "*gradient*"),
    ),
    Section("Speed", "Includes compilation in the first interval.", ("time/*second*",)),
    Section(
        "Where the time goes", "Shares of each step's wall time.", ("time/*_share",), together=True
    ),
    Section("Other", "", ("*",)),
)

# Headline figures: name in results.json, label, format. The table below them shows all.
HEADLINES = (
    ("recognised_generated", "generated images recognised", "{:.0%}"),
    ("recognised_real", "real images recognised", "{:.0%}"),
    ("loss", "loss, nats per code", "{:.3f}"),
    ("psnr", "PSNR, dB", "{:.2f}"),
    ("ssim", "SSIM", "{:.3f}"),
    ("lpips", "LPIPS", "{:.3f}"),
    ("codebook_usage", "codes in use", "{:.0%}"),
    ("perplexity", "perplexity", "{:,.1f}"),
    ("cfg_scale", "guidance scale", "{:g}"),
    ("images_per_second", "images/s", "{:,.1f}"),
    ("useful_share", "useful time", "{:.0%}"),
)

# How images were drawn: name of the setting, its words, and the value that says nothing.
GUIDANCE = (
    ("scale", "guidance scale {:g}", None),
    ("schedule", "schedule {}", None),
    ("window", "{} of the sequence", None),
    ("interval", "up to code {}", -1),
    ("temperature", "temperature {:g}", None),
    ("top_k", "top-k {}", 0),
    ("top_p", "top-p {:g}", 1),
)

# Runs inside a run's folder, in the order of its page, each with its own config.json.
STAGES = {"samples": "Samples", "prior": "Prior", "codes": "Codes"}
SHOWN = 16  # classes whose grids are in sight


def write(workdir: epath.PathLike) -> epath.Path:
    """Writes `index.html`, the page of a run, from the other files of its workdir.

    Sections without a file are left out. May be called at any moment of a run, by process 0.

    Args:
        workdir: folder of the run.

    Returns:
        Path of the page.
    """
    workdir = epath.Path(workdir)
    config, results = _json(workdir, "config.json"), _json(workdir, "results.json")
    environment = _json(workdir, "environment.json")
    stages = [name for name in STAGES if (workdir / name / "config.json").exists()]
    own = {key: value for key, value in results.items() if key.split("/")[0] not in stages}
    parts = [_header(workdir, stages, environment), _headlines(own)]
    for name in stages:
        parts += [_stage(workdir, name), _headlines(_json(workdir / name, "results.json"))]
        parts += _run(workdir / name, f"{name}/")
    if stages:
        parts.append('<h2 class="stage">Tokenizer</h2>')
    parts += [*_run(workdir), _table("Environment", dict(flatten(environment)))]
    page = resources.files("gigatok_jax.run").joinpath("page.html").read_text(encoding="utf-8")
    page = page.replace("{{title}}", html.escape(f"{config.get('name') or 'run'} · gigatok_jax"))
    path = workdir / "index.html"
    files.write_bytes(path, page.replace("{{body}}", "\n".join(filter(None, parts))).encode())
    return path


def _run(workdir: epath.Path, prefix: str = "") -> Iterator[str]:
    """Yields the HTML of one run's pictures, curves and tables.

    `prefix` is the path from the page to the run's folder, with a slash at its end.
    """
    config, results = _json(workdir, "config.json"), _json(workdir, "results.json")
    yield _classes(workdir, prefix, config, results)
    yield _pictures(workdir, prefix, config)
    yield from _curves(metric_writer.read(workdir), config)
    yield _table("All figures", dict(flatten(results)))
    yield _table("Config", dict(flatten(config)))


def _stage(workdir: epath.Path, name: str) -> str:
    """Returns a heading, as HTML, of a run inside another run, with a link to its own page."""
    own = f'<a href="{name}/index.html">own page</a>'
    link = own if (workdir / name / "index.html").exists() else ""
    return f'<h2 class="stage">{STAGES[name]} {link}</h2>'


def _json(workdir: epath.Path, name: str) -> dict[str, Any]:
    path = workdir / name
    return files.read_json(path) if path.exists() else {}


def _header(workdir: epath.Path, stages: Sequence[str], environment: Figures) -> str:
    config = _json(workdir, "config.json")
    kind, status = _status(workdir)
    unfinished = [stage for stage in stages if not (workdir / stage / "results.json").exists()]
    if unfinished:
        kind, status = _status(workdir / unfinished[-1])
        status = f"{STAGES[unfinished[-1]].lower()} {status}"
    devices = ", ".join(f"{n} x {kind}" for kind, n in environment.get("devices", {}).items())
    about = [
        config.get("task", "").replace("_", " "),
        devices,
        f"commit {environment['commit'][:10]}" if environment.get("commit") else "",
        f"written {datetime.datetime.now():%Y-%m-%d %H:%M}",
    ]
    name = html.escape(str(config.get("name") or "run"))
    line = html.escape(" · ".join(filter(None, about)))
    badge = f'<span class="badge {kind}">{html.escape(status)}</span>'
    return f'<header><h1>{name} {badge}</h1><p class="muted">{line}</p></header>'


def _status(workdir: epath.Path) -> tuple[str, str]:
    """Returns the CSS class and the text of the badge that says whether a run has finished.

    Results of an earlier, shorter run do not count.
    """
    config, results = _json(workdir, "config.json"), _json(workdir, "results.json")
    last = max((row["step"] for row in metric_writer.read(workdir)), default=0)
    if results and results.get("step", last) >= last:
        return "finished", f"finished at step {last:,}" if last else "finished"
    if config.get("task") in ("generate", "extract_codes"):
        return "stopped", "not finished"
    total = config.get("train", {}).get("steps")
    return "stopped", f"stopped at step {last:,}" + (f" of {total:,}" if total else "")


def _headlines(results: Figures) -> str:
    cards = []
    for (name, label, form), (key, value) in itertools.product(HEADLINES, results.items()):
        if key.rsplit("/", 1)[-1] == name and isinstance(value, int | float):
            number = html.escape(form.format(value))
            cards.append(
                f'<div class="card"><b>{number}</b><span>{html.escape(label)}</span></div>'
            )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _classes(workdir: epath.Path, prefix: str, config: Figures, results: Figures) -> str:
    """Returns HTML of the grids of generated images, class below class; "" without any."""
    found = [m for n in _picture_names(workdir) if (m := re.fullmatch(r"class_(\d+)_(.+)\.png", n))]
    if not found:
        return ""
    rows = []
    for match in sorted(found, key=lambda match: int(match[1])):
        number, name = str(int(match[1])), match[2].replace("_", " ")
        rows.append(_figure(f"{prefix}pictures/{match[0]}", " ".join({number: 0, name: 0})))
    body = f'<div class="rows">{"".join(rows[:SHOWN])}</div>'
    if len(rows) > SHOWN:
        body += f"<details><summary>{len(rows) - SHOWN} more classes</summary>"
        body += f'<div class="rows">{"".join(rows[SHOWN:])}</div></details>'
    count = "{images:,} images of {classes} classes. ".format(**results) if results else ""
    return _section("Generated images", count + _guidance(config), body)


def _guidance(config: Figures) -> str:
    """Says in a sentence how a config draws images; returns "" if the config draws none."""
    sample = config.get("sample", {})
    settings = {**config, **sample, **config.get("cfg", {})}
    # Earlier versions kept the guidance of a prior's run as sample.cfg_scale and so on.
    settings = {"end": 1.0} | {k.removeprefix("cfg_"): value for k, value in settings.items()}
    if "scale" not in settings:
        return ""
    if settings.get("schedule") in ("step", "rectangular"):
        settings["window"] = "{start:g} to {end:g}".format(**settings)
    words = [
        form.format(settings[name])
        for name, form, silent in GUIDANCE
        if name in settings and settings[name] != silent
    ]
    return f"{', '.join(words)}.".capitalize()


def _picture_names(workdir: epath.Path) -> list[str]:
    folder = workdir / "pictures"
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _pictures(workdir: epath.Path, prefix: str, config: Figures) -> str:
    names = _picture_names(workdir)
    found = sorted((m for n in names if (m := re.fullmatch(r"(.+)_(\d+)\.png", n))), key=_order)
    groups = itertools.groupby(
        (match for match in found if not match[1].startswith("class_")), key=lambda match: match[1]
    )
    notes = {
        "reconstruction": "Originals above, their reconstructions below.",
        "samples": _guidance(config),
    }
    return "\n".join(
        _gallery(prefix, kind, notes.get(kind, ""), list(group)) for kind, group in groups
    )


def _order(match: re.Match) -> tuple[bool, str, int]:
    """Returns the sorting key of a picture.

    Reconstructions and samples come first, then pictures by kind; in each kind the newest first.
    """
    return match[1] not in ("reconstruction", "samples"), match[1], -int(match[2])


def _gallery(prefix: str, kind: str, note: str, found: Sequence[re.Match]) -> str:
    figures = [_figure(f"{prefix}pictures/{m[0]}", f"step {int(m[2]):,}", kind) for m in found]
    body = figures[0]
    if older := figures[1:]:
        body += f"<details><summary>{len(older)} earlier</summary>"
        body += f'<div class="older">{"".join(older)}</div></details>'
    return _section(kind.replace("_", " ").capitalize(), note, body)


def _figure(source: str, caption: str, kind: str = "") -> str:
    source, caption = html.escape(source), html.escape(caption)
    words = ", ".join(filter(None, (html.escape(kind), caption)))
    return (
        f'<figure><figcaption>{caption}</figcaption><a href="{source}">'
        f'<img src="{source}" alt="{words}" loading="lazy"></a></figure>'
    )


def _section(title: str, note: str, body: str) -> str:
    note = f'<p class="muted">{html.escape(note)}</p>' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{note}{body}</section>"


def _table(title: str, figures: Figures) -> str:
    if not figures:
        return ""
    cells = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(_show(value))}</td></tr>"
        for key, value in figures.items()
    )
    return f"<details><summary>{html.escape(title)}</summary><table>{cells}</table></details>"


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _curves(rows: Sequence[dict], config: Figures) -> Iterator[str]:
    left = _series(rows)
    first = (PRIOR_LOSS,) if config.get("task") == "train_prior" else ()
    for section in (*first, *SECTIONS):
        chosen = [k for k in left if any(fnmatch.fnmatch(k, p) for p in section.patterns)]
        taken = {key: left.pop(key) for key in chosen}
        if taken:
            drawn = "".join(
                charts.line_chart(name, lines, not section.together)
                for name, lines in _charts(section, taken)
            )
            yield _section(section.title, section.note, f'<div class="charts">{drawn}</div>')


def _series(rows: Sequence[dict]) -> dict[str, charts.Points]:
    """Collects the points (step, value) of each metric from the rows of metrics.jsonl.

    A value that was not finite is NaN, which leaves a gap in its line.
    """
    series: dict[str, charts.Points] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step":
                point = (row["step"], math.nan if value is None else value)
                series.setdefault(key, []).append(point)
    return series


def _charts(
    section: Section, series: dict[str, charts.Points]
) -> Iterator[tuple[str, dict[str, charts.Points]]]:
    """Yields the title of each chart of a section, and the chart's lines: label -> points."""
    if section.together:
        yield "share", {k.rsplit("/", 1)[-1].removesuffix("_share"): p for k, p in series.items()}
        return
    for name in dict.fromkeys(key.rsplit("/", 1)[-1] for key in series):
        lines = {k.rsplit("/", 1)[0]: p for k, p in series.items() if k.rsplit("/", 1)[-1] == name}
        yield name, lines
