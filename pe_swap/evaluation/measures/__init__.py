"""What an evaluation measures."""
