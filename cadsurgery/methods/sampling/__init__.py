"""Stochastic feature sampling and interpolation (Xie et al., ECCV 2020): residual branches are computed where gates are
open, and interpolated elsewhere."""

from cadsurgery.methods.sampling.model import SampledModel, sample
from cadsurgery.methods.sampling.report import SampledMacs, SamplingPlan
