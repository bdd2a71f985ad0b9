"""Training of ternary language models from plain text: corpus, loop, command."""
