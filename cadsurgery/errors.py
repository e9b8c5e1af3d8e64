"""Exceptions and what makes their messages: the public names of `cadsurgery.support.errors`."""

from cadsurgery.support.errors import *  # noqa: F403
