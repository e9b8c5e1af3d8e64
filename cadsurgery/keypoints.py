"""Keypoints and descriptors of a network: the public names of `cadsurgery.tasks.keypoints`."""

from cadsurgery.tasks.keypoints import *  # noqa: F403
