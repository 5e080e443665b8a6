"""Experiments too long for a page: `engine` runs and stores them; the others are one each, or data."""
