"""A function in a new process, whose environment it is started with: for measurements that must not share one."""

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
    """The last line that a function of a string prints in a new process with this one's import path.

    Args:
        module: where the function is.
        function: its name.
        argument: it is called with.
        environment: variables that the process gets besides those of this one.
        task: of the process, for the message of an error: "measure memory".
        next: what the user can do if it fails.

    Raises:
        CadError: the process failed.
    """
    code = f"import sys; from {module} import {function}; {function}(sys.argv[1])"
    path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
    told = {**os.environ, **environment, "PYTHONPATH": path}
    command = [sys.executable, "-c", code, argument]
    done = subprocess.run(command, env=told, capture_output=True, text=True)
    if done.returncode != 0:
        raise CadError(
            f"a process that was to {task} failed.",
            why=done.stderr.strip().rpartition("\n")[2]
            or f"it ended with {done.returncode}, perhaps killed.",
            next=next,
        )
    return done.stdout.splitlines()[-1]
