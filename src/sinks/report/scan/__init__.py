"""A survey to look at, and to keep: one page a model, one page for many, a card, plain data and tidy tables."""
