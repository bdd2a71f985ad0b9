"""What each family of models calls its settings and tensors."""
