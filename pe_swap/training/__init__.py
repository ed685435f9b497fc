"""Training of a swapped model."""
