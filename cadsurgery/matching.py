"""Matches of keypoints and what they are worth: the public names of `cadsurgery.tasks.keypoints.matching`."""

from cadsurgery.tasks.keypoints.matching import *  # noqa: F403
