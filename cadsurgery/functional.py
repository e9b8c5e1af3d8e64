"""The operations on elements: the public names of `cadsurgery.elements.functional`."""

from cadsurgery.elements.functional import *  # noqa: F403
