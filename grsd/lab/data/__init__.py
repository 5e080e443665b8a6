"""Data: text as token arrays, images, the help text of Python, functions as regression tasks."""
