"""Perplexity at context lengths a model was never trained on."""
