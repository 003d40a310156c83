"""Compiles `step.c` for this processor, once, with the C compiler of this machine."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from sinks.assets.folder import workspace, writable
from sinks.errors import UnsupportedOption

SOURCE = Path(__file__).with_name("step.c")

# No -ffast-math when linking: gcc would then make every float of the process round small numbers to zero.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-funsafe-math-optimizations", "-fno-math-errno", "-fno-trapping-math")
OPENMP = ("-fopenmp", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled step, from the cache folder if it was compiled before on such a processor.

    Raises UnsupportedOption, saying why, where there is no compiler, or it fails.
    """
    torch.get_num_threads()  # torch's OpenMP must be the one of the process, so that both share their threads
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise UnsupportedOption("there is no C compiler here: install gcc, or set CC")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = "\n".join((SOURCE.read_text(), *FLAGS, *OPENMP, version, _processor()))
    name = f"step-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        path = writable("native") / name
        if not path.is_file():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        raise UnsupportedOption(
            f"{compiler} could not compile the decode step ({' '.join(told.split())[:200]})"
        ) from error


def _compile(compiler: str, path: Path) -> None:
    with workspace(path.stem) as work:
        made, linked = work / "step.o", work / path.name
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
        run([compiler, *FLAGS, *OPENMP, "-c", str(SOURCE), "-o", str(made)])
        run([compiler, "-shared", *OPENMP, str(made), "-o", str(linked), "-lm"])
        os.replace(linked, path)


def _processor() -> str:
    """What -march=native looks at, as far as the system tells."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join(dict.fromkeys(told)) or f"{platform.machine()} {platform.processor()}"
