"""Weights of linear layers in fewer bits: the formats, and how the values are chosen."""
