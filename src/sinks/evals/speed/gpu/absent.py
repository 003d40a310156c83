"""Why somebody could not be measured: a peer may fail in any way, and the others shall be measured nevertheless."""

from __future__ import annotations

import torch

NO_ROOM = "its memory does not fit here"


def reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return NO_ROOM
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
