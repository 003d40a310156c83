"""One token of every row, in one kernel a layer: turn, write the ring, attend, statistics."""

from sinks.kernels.device.step.launch import Cut, HeadNorms, Step, attend_step

__all__ = ["Cut", "HeadNorms", "Step", "attend_step"]
