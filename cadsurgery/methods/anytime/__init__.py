"""Anytime prediction with confidence (Liu et al., ICLR 2022): exits, and work where they are not confident."""

from cadsurgery.methods.anytime.model import AnytimeModel, Threshold, anytime
from cadsurgery.methods.anytime.report import AnytimeMacs, AnytimePlan

__all__ = ["AnytimeMacs", "AnytimeModel", "AnytimePlan", "Threshold", "anytime"]
