"""Non-uniform sampling of the input (Marin et al., ICCV 2019): more pixels where boundaries of classes matter."""

from cadsurgery.methods.resampling.back import interpolate_back
from cadsurgery.methods.resampling.locations import (
    PUBLISHED_SMOOTHNESS,
    boundaries,
    sample,
    target_locations,
    uniform_locations,
)
from cadsurgery.methods.resampling.model import ResampledModel, resample
from cadsurgery.methods.resampling.report import ResampledMacs, ResampledPlan, conv_macs
from cadsurgery.methods.resampling.samplers import (
    LabelSampler,
    LearnedSampler,
    MaskSampler,
    Sampler,
    SamplerOptions,
    UniformSampler,
)
