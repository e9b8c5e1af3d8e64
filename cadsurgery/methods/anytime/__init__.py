"""Anytime prediction (Liu et al., ICLR 2022): early exits, and no further computation where an exit is confident."""

from cadsurgery.methods.anytime.model import AnytimeModel, Threshold, anytime
from cadsurgery.methods.anytime.report import AnytimeMacs, AnytimePlan
