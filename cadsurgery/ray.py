"""Many pictures by Ray Data: the public names of `cadsurgery.tasks.ray_data`."""

from cadsurgery.tasks.ray_data import *  # noqa: F403
