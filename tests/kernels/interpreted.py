"""Triton on a CPU: its interpreter, where Triton is installed. `tests/conftest.py` asks for it."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (no dependency of CPU builds)")


def interpret_on_cpu() -> None:
    """Have kernels run as Python where there is no GPU."""
    if HAS_GPU or not HAS_TRITON:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patched = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patched(tensor, scope)
        # Triton 3.6 holds a scalar as an array of one, which numpy 2.4 no longer turns into an int by itself.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
