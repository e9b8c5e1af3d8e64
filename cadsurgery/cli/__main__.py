"""`python -m cadsurgery.cli`."""

from cadsurgery.cli import main

main()
