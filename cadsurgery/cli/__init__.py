"""The command line: one module for each group of commands.

In come words; out go calls of tasks with their options, and what they report, printed. It computes nothing itself.
"""

from cadsurgery.cli.main import main

__all__ = ["main"]
