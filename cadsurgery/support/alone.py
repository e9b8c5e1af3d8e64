"""Run a function in a new process with its own environment, for measurements that must not share a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from cadsurgery.support.errors import CadError


def run_alone(
    module: str, function: str, argument: str, environment: Mapping[str, str], task: str, next: str
) -> str:
    """Call a function in a new process and return the last line that it prints.

    The new process has the import path of this one.

    Args:
        module: name of the function's module.
        function: name of the function.
        argument: the string that the function is called with.
        environment: variables added to the environment of this process.
        task: purpose of the process, for error messages, e.g. "measure memory".
        next: advice for the user if the process fails.

    Raises:
        CadError: the process failed.
    """
    code = f"import sys; from {module} import {function}; {function}(sys.argv[1])"
    path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
    variables = {**os.environ, **environment, "PYTHONPATH": path}
    command = [sys.executable, "-c", code, argument]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode != 0:
        raise CadError(
            f"a process that was to {task} failed.",
            why=done.stderr.strip().rpartition("\n")[2]
            or f"it ended with {done.returncode}, perhaps killed.",
            next=next,
        )
    return done.stdout.splitlines()[-1]
