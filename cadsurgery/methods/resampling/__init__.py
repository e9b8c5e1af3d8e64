"""Non-uniform sampling of the input (Marin et al., ICCV 2019): more pixels near the boundaries of classes that matter."""

from cadsurgery.methods.resampling.back import interpolate_back
from cadsurgery.methods.resampling.locations import (
    PUBLISHED_SMOOTHNESS,
    boundaries,
    target_locations,
    uniform_locations,
)
from cadsurgery.methods.resampling.sampling import sample
