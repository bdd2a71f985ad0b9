"""How transformers stores ternary weights."""
