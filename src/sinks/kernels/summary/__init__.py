"""Dense causal attention that says of every query, while it runs, what a lens would otherwise ask whole blocks for."""
