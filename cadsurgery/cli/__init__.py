"""The command line: one module for each group of commands.

In come the words of a command line; out go calls of tasks, and their reports are printed. Nothing is computed here.
"""

from cadsurgery.cli.main import main

__all__ = ["main"]
