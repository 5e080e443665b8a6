"""The theorems of 2512.18209 under test, each module named after its subject."""
