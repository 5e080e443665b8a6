"""Experiments too long for a page: `engine` runs and stores them; each other module is one, or data."""
