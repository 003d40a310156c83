"""The sinks merged inside flash-attn-4's Hopper kernel, while a tile of the result is still in registers.

A merge after the window reads and writes the result once more, an eighth of the time of a window of 1,020. Here two
methods of flash-attn-4's kernel are overridden and nothing else of it. Before a tile's window is walked, its sinks'
scores and values are left in shared memory: registers are what the walk is short of, and one that held an address
meanwhile would slow every step of it. When the tile has its window, normalised, it is scaled by the window's share of
the whole softmax, and weights times the sinks' values are added by matrix instructions of a warp, whose registers lie
like those of the tile. Weights are rounded to half precision for it, after they were normalised
(flash-attn-4 rounds those of the window before).

Scores are those found while heads were turned; where nothing is turned they are found here, from queries that are in
shared memory anyway, and written for the backward pass.

The class that is overridden is private to flash-attn-4: `why_not_inside` knows versions and signatures by name, and
everywhere else the window is merged by `sink_part.merge_sinks`, a pass of its own.
"""
