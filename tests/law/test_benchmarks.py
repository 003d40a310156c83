"""Benchmarks are run seldom, some on machines that are not here: that each begins, and what pages name is there."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.law.tree import ROOT, project_files, python_files

PAGES = [path for path in project_files() if path.suffix == ".md" and path.name not in ("LOG.md", "CHANGELOG.md")]
NAMED = re.compile(r"benchmarks/[\w/.-]+\.(?:py|json)")
BARE = re.compile(r"(?<![\w/-])[\w-]+-h200\.json")
"""Pages may name the results of the GPU by the file alone."""


@pytest.mark.parametrize("program", python_files("benchmarks"), ids=str)
def test_every_benchmark_says_what_it_does(
    program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", [program.name, "--help"])
    monkeypatch.setattr(sys, "path", [str((ROOT / program).parent), *sys.path])
    with torch.enable_grad(), pytest.raises(SystemExit) as ended:  # whose main switches gradients off, for itself
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert not ended.value.code
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_benchmarks_and_results_that_a_page_names_are_there(page: Path):
    text, there = (ROOT / page).read_text(), set(project_files())
    named = {Path(name) for name in NAMED.findall(text)}
    named |= {Path("benchmarks/results") / name for name in BARE.findall(text)}
    assert not sorted(str(name) for name in named - there)


def test_results_belong_to_a_benchmark_or_a_page():
    texts = [(ROOT / path).read_text() for path in (*PAGES, *python_files("benchmarks", "src"))]
    results = [path for path in project_files() if path.parent == Path("benchmarks/results")]
    programs = {path.stem for path in python_files("benchmarks")}
    lost = [path.name for path in results if path.stem not in programs and not any(path.name in text for text in texts)]
    assert not lost
