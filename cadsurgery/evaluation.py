"""Evaluating converted networks: the public names of `cadsurgery.tasks.evaluation`."""

from cadsurgery.tasks.evaluation import *  # noqa: F403
