"""What lenses ask for, summed up where it arises: dense causal attention by itself, and the states of its tokens."""
