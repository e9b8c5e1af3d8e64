"""Multiply-accumulates: the public names of `cadsurgery.network.macs`."""

from cadsurgery.network.macs import *  # noqa: F403
