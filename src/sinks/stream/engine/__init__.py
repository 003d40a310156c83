"""Many streams in one batch: who runs when, what a row is, and the loop that hands out their answers."""
