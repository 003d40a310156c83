"""Scores streams, and sets ways of reading them side by side: `sinks.evals.compare` is the main job."""
