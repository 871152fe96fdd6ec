"""Ratios measured in one run: the plain way, the best library and ours, on the same inputs, with the same answers."""
