"""Test that the pages name files, headings, modules, commands and options that exist."""

import contextlib
import functools
import importlib.util
import io
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.data import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "checkpoints").glob("*.md")])


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading)) for heading in headings]
    return {each.lower().replace(" ", "-") for each in words}


def _named(pattern: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for found in sorted(set(re.findall(pattern, page.read_text(encoding="utf-8")))):
            yield page.relative_to(ROOT).as_posix(), found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in _anchors(linked), f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize(("page", "path"), _named(r"`((?:latent_codec|train|tools|tests|checkpoints|docs)/[\w/.\-]*)`"))
def test_paths_exist(page: str, path: str) -> None:
    assert (ROOT / path).exists(), f"{page} names {path}"


@pytest.mark.parametrize(("page", "module"), _named(r"(?:-m |`)((?:latent_codec|train|tools)(?:\.\w+)+)"))
def test_modules_exist(page: str, module: str) -> None:
    """Accept a module, or an attribute of one."""
    parent, _, name = module.rpartition(".")
    found = importlib.util.find_spec(parent)
    assert found is not None, f"{page} names {module}"
    attribute = re.search(rf"\b{name}\b", Path(found.origin or "").read_text(encoding="utf-8"))
    assert attribute or importlib.util.find_spec(module), f"{page} names {module}"


def test_pages_name_no_path_outside_the_repository() -> None:
    for page in PAGES:
        assert "../shared" not in page.read_text(encoding="utf-8"), page


def _commands() -> Iterator[tuple[str, str, set[str]]]:
    """Yield the module, the subcommand or preset, and the options of each command line in the pages."""
    program = re.compile(r"(?:(latent-codec)|-m ((?:train|tools)(?:\.\w+)+)) +([a-z]\w*)?([^#`]*)")
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            for installed, module, word, rest in program.findall(line.replace(" | ", " ")):
                options = set(re.findall(r"(?<=[ \[])--[a-z][\w-]*", " " + rest.split("&&")[0]))
                default = "photo" if module == "train.vae" else ""  # the pages write PRESET
                yield "latent_codec.cli" if installed else module, word or default, options


@functools.cache
def _help(module: str, word: str) -> str:
    """Return the help of a program's subcommand or preset, or of the program if it has none of that name."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [module, *([word] if word else []), "--help"])
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_module(module, run_name="__main__")
    return printed.getvalue()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_options_exist() -> None:
    for module, word, options in _commands():
        if options:
            printed = _help(module, word)
            missing = {option for option in options if not re.search(rf"{option}\b(?!-)", printed)}
            assert not missing, f"{module} {word} has no {missing}"
