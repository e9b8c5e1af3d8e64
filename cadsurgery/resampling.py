"""Networks on resampled images: the public names of `cadsurgery.methods.resampling`."""

from cadsurgery.methods.resampling import *  # noqa: F403
