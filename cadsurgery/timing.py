"""Timings of rivals, in turns: the public names of `cadsurgery.support.timing`."""

from cadsurgery.support.timing import *  # noqa: F403
