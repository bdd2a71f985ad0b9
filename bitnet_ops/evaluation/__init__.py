"""How well a model predicts a text, and how sparse it is."""
