"""What may stand where a file is looked for, made privately: a folder, a FIFO, a socket, a device."""

import os
import socket
import stat
from pathlib import Path

import pytest

NODES = ("folder", "FIFO", "socket", "device")


def make(kind: str, path: Path) -> Path:
    """Make one of `NODES` as `path`; a device only where this process may make one."""
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(path))  # a socket's name is short
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except OSError as error:
            pytest.skip(f"no device can be made here ({error.strerror})")
    return path


def kind_of(path: Path) -> int:
    """What stands there now: the test that made it compares."""
    return stat.S_IFMT(path.lstat().st_mode)
