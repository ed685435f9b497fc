"""The commands, one for each script."""
