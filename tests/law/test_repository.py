"""What may be committed: nothing large, no weights, and no trace of the machine that it was written on."""

import os
import re
from collections.abc import Iterator

from tests.law.tree import ROOT, project_files

WEIGHTS = {".bin", ".ckpt", ".deb", ".gguf", ".h5", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".whl"}

# The hosts and folders are put together here, so that this file does not contain what it looks for.
HOSTS = ["py" + "pi.org", "pythonhosted" + ".org", "deb." + "debian", "registry." + "npmjs", "download." + "pytorch"]
TOPS = "|".join(["ho" + "me", "ro" + "ot", "Us" + "ers", "t" + "mp", "wo" + "rk"])
FOLDERS = re.compile(rf"(?<![\w.~-])/(?:{TOPS})/\w")


def lines() -> Iterator[tuple[str, str]]:
    """Every line of every text of the project, with its place."""
    for path in project_files():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture
            continue
        yield from ((f"{path}:{number}", line) for number, line in enumerate(text.splitlines(), start=1))


def test_nothing_large_is_committed():
    assert not [path for path in project_files() if (ROOT / path).stat().st_size > 2 * 2**20]


def test_no_weights_and_no_packages_are_committed():
    assert not [path for path in project_files() if path.suffix in WEIGHTS]


def test_no_registry_is_named_by_its_host():
    assert not [place for place, line in lines() if any(host in line for host in HOSTS)]


def test_no_folder_of_one_machine_is_named():
    assert not [place for place, line in lines() if FOLDERS.search(line)]


def test_the_patterns_find_what_they_look_for():
    assert FOLDERS.search("see /" + "tmp/x") and FOLDERS.search('"/' + 'home/me"')
    assert not FOLDERS.search("out/" + "tmp/x") and not FOLDERS.search("https://host.org/" + "work")


def test_ci_calls_the_targets_that_the_readme_names():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"^make (\w+)", script.read_text(), re.MULTILINE) == ["lint", "test"]
