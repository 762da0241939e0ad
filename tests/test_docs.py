"""What the README and the other documents say is there: links, configs, keys, modules, commands."""

import functools
import importlib
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import ml_collections
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "launch" / "README.md"])
PRESENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # the others name what is there
LANGUAGES = {"bash", "python", "console", "text", "mermaid"}  # see CONTRIBUTING.md, "Documents"
RUN = {"bash", "python"}
SECONDS = 900  # of one fence, on a machine that does other things too
DEMO = ["main.py", "--config=configs/demo.py:smoke", "--workdir=runs/demo"]


class Fence(NamedTuple):
    language: str
    line: int  # of its first command, counted from 1
    text: str


def fences(page: pathlib.Path) -> list[Fence]:
    """Code blocks of a page, in order."""
    text = page.read_text()
    return [
        Fence(match[1], text[: match.start()].count("\n") + 2, match[2])
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def prose(page: pathlib.Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: pathlib.Path) -> Iterator[list[str]]:
    """Words of every shell command, continued lines joined and comments left out."""
    for fence in fences(page):
        if fence.language in ("bash", "console"):
            for line in fence.text.replace("\\\n", " ").splitlines():
                for command in " ".join(shlex.split(line, comments=True)).split(" && "):
                    if command:
                        yield command.split()


def spans(page: pathlib.Path) -> Iterator[str]:
    """Words of what a page sets as code within its sentences."""
    for paragraph in prose(page).split("\n\n"):
        for span in re.findall(r"`([^`]+)`", paragraph):
            yield from span.split()


@functools.cache
def config_of(file: str, argument: str = "") -> ml_collections.ConfigDict:
    """A config such as "configs/ss.py" with what stands behind the colon."""
    assert (ROOT / file).exists(), f"{file} is not there"
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    return module.get_config(argument or None)


def has(config, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(config, ml_collections.ConfigDict) or name not in config:
            return False
        config = config[name]
    return True


@functools.cache
def configs() -> tuple[ml_collections.ConfigDict, ...]:
    files = [path.name for path in (ROOT / "configs").glob("*.py") if path.stem != "common"]
    return tuple(config_of(f"configs/{name}") for name in files)


def ids(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), f"{target} leads nowhere"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{target}: no such section"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_code_says_whether_it_is_run(page):
    for fence in fences(page):
        assert fence.language in LANGUAGES, f"line {fence.line}: ```{fence.language}"


@pytest.mark.parametrize("page", PRESENT, ids=ids)
def test_commands_name_configs_keys_and_modules_that_exist(page):
    for words in commands(page):
        named = [word.split("=", 1)[1] for word in words if word.startswith("--config=")]
        for name in named:
            config = config_of(*name.split(":", 1))
            keys = [word[9:].split("=")[0] for word in words if word.startswith("--config.")]
            assert all(has(config, key) for key in keys), f"{' '.join(words)}: {keys}"
        if "-m" in words:
            module = words[words.index("-m") + 1]
            assert importlib.util.find_spec(module), f"no module {module}"
        if "main.py" in words:
            assert named, f"{' '.join(words)} names no config"


@pytest.mark.parametrize("page", PRESENT, ids=ids)
def test_sentences_name_configs_keys_and_files_that_exist(page):
    groups = {key for config in configs() for key in config if has_fields(config[key])}
    for word in spans(page):
        if re.search(r"[<>*]|\.\.\.", word):  # stands for several
            continue
        word = word.strip(",;")
        key = word.removeprefix("--config.").split("=")[0].split("[")[0]
        if word.startswith("--config.") or (key.split(".")[0] in groups and is_key(key)):
            assert any(has(config, key) for config in configs()), f"no config has {word}"
        elif match := re.fullmatch(r"(?:--config=)?(configs/\w+\.py)(?::(.+))?", word):
            if match[1] != "configs/common.py":
                config_of(match[1], match[2] or "")
        elif word.startswith(("configs/", "gigatok_jax/", "tests/", "launch/", "docs/", ".ci/")):
            assert (ROOT / word).exists(), f"{word} is not there"
        elif match := re.match(r"gigatok_jax(\.\w+)+", word):
            assert exists(match[0]), f"{word} is not there"


def has_fields(value) -> bool:
    return isinstance(value, ml_collections.ConfigDict)


def is_key(word: str) -> bool:
    """Whether a word looks like a key of a config, and not like the name of a file."""
    return bool(re.fullmatch(r"\w+(\.\w+)+", word)) and not word.endswith((".md", ".safetensors"))


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or stands in one."""
    try:
        if importlib.util.find_spec(name):
            return True
    except ModuleNotFoundError:
        pass
    module, _, attribute = name.rpartition(".")
    return bool(module) and hasattr(importlib.import_module(module), attribute)


def test_the_picture_of_the_readme_is_small():
    (picture,) = re.findall(r"!\[[^]]*\]\((.+)\)", (ROOT / "README.md").read_text())
    assert (ROOT / picture).stat().st_size <= 60_000


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
    """A folder that looks like the checkout, with a small demo in it; runs stay in there."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("runs", "build"):
            (folder / path.name).symlink_to(path)
    run([sys.executable, *DEMO], folder)
    return folder


def run(command: list[str], folder: pathlib.Path) -> None:
    bin_first = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": bin_first},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


RUNNING = [page for page in PAGES if any(fence.language in RUN for fence in fences(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING, ids=ids)
def test_commands_run(page, checkout):
    """A page's commands one after the other, as its reader would, behind the demo."""
    for fence in fences(page):
        if fence.language == "bash":
            run(["bash", "-euo", "pipefail", "-c", fence.text], checkout)
        elif fence.language == "python":
            run([sys.executable, "-c", fence.text], checkout)
