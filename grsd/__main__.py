"""``python -m grsd``: the command line without an installed entry point."""

from grsd.cli import main

main(prog_name="grsd")
