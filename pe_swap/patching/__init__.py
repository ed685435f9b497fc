"""How schemes get into a model and out of it."""
