"""Layers: ternary linear layers, the norm, and how weights are packed and replaced."""
