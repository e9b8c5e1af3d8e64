"""Measuring converted networks: the public names of `cadsurgery.tasks.bench`."""

from cadsurgery.tasks.bench import *  # noqa: F403
