"""Models and texts that arrive from package registries: what there is, bringing it once, reading it."""
