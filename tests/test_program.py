"""Test how programs begin and end: narrow terminals, stripped docstrings, closed or full outputs, and hostile names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latent_codec.errors import UserError, printable
from latent_codec.program import CLOSED_PIPE, paragraph, say
from tests.support.data import ROOT

HOSTILE = "a\x1b]0;title\x07\x9b2J\r\n\u2028\u202eb\udcff\0"
"""A name that clears the screen, sets a terminal's title, forges a line, turns the writing and is no Unicode."""


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell line with $PY as the interpreter."""
    variables = os.environ | {"PY": sys.executable, "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        ["bash", "-c", script], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("columns", ["1", "4", "0", "-3", "many"])
def test_help_ends_in_any_width(columns: str) -> None:
    done = python("ulimit -v 8000000; $PY -m latent_codec.cli --help", COLUMNS=columns)
    assert (done.returncode, "encode" in done.stdout) == (0, True)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train.vae", "train.diffusion", "train.prior", "train.recipe", "latent_codec.cli"])
def test_programs_work_without_docstrings_and_asserts(program: str) -> None:
    done = python(f"$PY -m {program} --help", PYTHONOPTIMIZE="2")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_change_no_exit_code(closed: str) -> None:
    """A file of ours does not get a closed stream's number, where text for the stream would go into it."""
    work = "lambda: open('/dev/null').fileno() < 3"
    script = f'$PY -c "import sys; from latent_codec.program import exit_code; sys.exit(exit_code({work}))" {closed}'
    assert python(f"{script} && $PY -m latent_codec.cli --version {closed}").returncode == 0


def test_a_full_disk_under_stdout_and_a_closed_pipe_are_told_apart() -> None:
    full = python("$PY -m latent_codec.cli --version > /dev/full")
    assert (full.returncode, full.stderr) == (
        2,
        "latent-codec: the output cannot be written: No space left on device\n",
    )
    pipe = python("$PY -m latent_codec.cli --help | true; exit ${PIPESTATUS[0]}")
    assert pipe.returncode in (0, CLOSED_PIPE) and pipe.stderr == ""


def test_an_output_without_unicode_takes_escapes(tmp_path: Path) -> None:
    (tmp_path / "\u00e9").write_text("no stream")
    done = python(f"$PY -m latent_codec.cli info {tmp_path}/nothing-\u00e9", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and "nothing-\\xe9" in done.stderr


def test_names_from_files_neither_steer_a_terminal_nor_forge_lines(capsys: pytest.CaptureFixture[str]) -> None:
    plain = "a\\x1b]0;title\\x07\\x9b2J\\r\\n\\u2028\\u202eb\\udcff\\x00"
    assert printable(HOSTILE) == str(UserError(HOSTILE)) == paragraph([HOSTILE]) == plain
    assert printable("Zürich, 東京 🙂 'x' \\n") == "Zürich, 東京 🙂 'x' \\n"
    say(paragraph(["one", HOSTILE]))
    say(HOSTILE.replace("\n", ""), error=True)
    printed = capsys.readouterr()
    assert printed.out == f"one\n{plain}\n" and printed.err == plain.replace("\\n", "") + "\n"
