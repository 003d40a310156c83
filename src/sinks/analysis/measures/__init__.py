"""What is measured: sink rates, massive activations, entropy, mixing, meaning, repetition; one file each."""
