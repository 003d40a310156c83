"""What every test gets: no network by accident, the same seeds, and markers that follow from where a test lives.

This file must not import `sinks`: the plugin that checks shapes (see pyproject.toml) has to see that import first.
"""

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tiny models are made here; the built-in one comes by another way
os.environ.setdefault("MPLBACKEND", "Agg")

# A deadline measures how busy the machine is. In CI the examples are fixed; elsewhere every run tries new ones.
settings.register_profile("sinks", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("sinks")

if importlib.util.find_spec("triton"):  # no dependency of builds for CPUs, where its kernels run interpreted
    from tests.kernels.interpreted import interpret_on_cpu

    interpret_on_cpu()  # before anything imports `sinks.kernels`

WHOLE = Path(__file__).parent / "whole"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is in tests/whole/, keep it in one process, start with it, and skip what needs a missing GPU."""
    for item in items:
        if WHOLE in item.path.parents:
            item.add_marker("whole")
        if item.get_closest_marker("whole") and config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group("whole"))  # one process fetches the model, and holds it once
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(key=lambda item: item.get_closest_marker("whole") is None)


def _has_gpu() -> bool:
    import torch  # only asked where a test is marked `gpu`

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def same_seeds() -> None:
    """Start every test from the same random state, whichever process it runs in."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Let wrong types through, as they come from users: for the tests of our own answer to them."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def full() -> Path:
    """A disk without room, as the system has it for such tests; only to be opened, never to be replaced."""
    device = Path("/dev/full")
    if not device.is_char_device():
        pytest.skip("this system has no /dev/full")
    return device


@pytest.fixture
def run_sinks(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command as a person does: `run_sinks("models", "--supported")` in a fresh process and an empty folder.

    `piped` is what it finds on its standard input.
    """

    def run(*arguments: str, piped: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sinks", *arguments],
            cwd=tmp_path,
            env=os.environ | {"NO_COLOR": "1", "COLUMNS": "80"} | environment,
            input=piped,
            capture_output=True,
            text=True,
        )

    return run
