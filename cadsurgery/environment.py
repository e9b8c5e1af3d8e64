"""Versions, devices, functions by name: the public names of `cadsurgery.support.provenance`."""

from cadsurgery.support.provenance import *  # noqa: F403
