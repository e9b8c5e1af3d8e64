"""Figures: the public names of `cadsurgery.tasks.figures`."""

from cadsurgery.tasks.figures import *  # noqa: F403
