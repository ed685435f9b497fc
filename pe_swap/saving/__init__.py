"""How a swapped model is written, and comes back."""
