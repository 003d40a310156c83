"""Attention with sinks as pure functions: tensors in, tensors out. Knows no model and no cache."""

from sinks.kernels.api import attend, attend_measured, choose
from sinks.kernels.device.forward import Statistics
from sinks.kernels.device.step import Cut, HeadNorms, Step, attend_step
from sinks.kernels.phase import Rotary
from sinks.kernels.scoring import Scoring

__all__ = [
    "Cut",
    "HeadNorms",
    "Rotary",
    "Scoring",
    "Statistics",
    "Step",
    "attend",
    "attend_measured",
    "attend_step",
    "choose",
]
