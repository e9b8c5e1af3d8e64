"""The command line: one module for each group of commands.

Commands parse their arguments, call tasks with the options, and print the reports. They compute nothing themselves.
"""

from cadsurgery.cli.main import main

__all__ = ["main"]
