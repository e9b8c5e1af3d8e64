"""Anytime prediction with confidence (Liu et al., ICLR 2022): exits, and work where they are not confident."""

from cadsurgery.methods.anytime.model import AnytimeModel, anytime
