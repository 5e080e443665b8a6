"""Checkpoints: the suite trained here, and the loader of any model in Hugging Face format."""
