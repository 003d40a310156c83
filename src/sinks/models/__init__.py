"""Everything that knows how transformers builds a model."""
