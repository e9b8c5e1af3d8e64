"""Reading, preparing and generating pictures: the public names of `cadsurgery.data.images`."""

from cadsurgery.data.images import *  # noqa: F403
