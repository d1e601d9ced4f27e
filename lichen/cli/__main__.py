"""`python -m lichen.cli`: the command line without its console script."""

from lichen.cli import main

main()
