"""What stays of a stream, and where it now stands."""
