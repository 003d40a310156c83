"""What one layer holds: keys and values in slots, in full or as int8, and how a step meets them."""
