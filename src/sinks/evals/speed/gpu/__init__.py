"""What one GPU does: decoding and attention against peers, in turn in one run, and the ceilings they are held to."""
