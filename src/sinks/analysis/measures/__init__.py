"""What is measured: sink rates, massive activations, entropy, mixing, meaning, repetition; one file each.

`importance` and `rows` collect, from attention as it happens, what sink rates and entropies are made of.
"""
