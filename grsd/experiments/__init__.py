"""Experiments too long for a page: `engine` runs and stores them, the rest are these."""
