"""How fast tokens are written, by us and by others, in turn in one run, and what rounding the weights costs."""
