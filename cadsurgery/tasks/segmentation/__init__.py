"""Segmentation: how good the classes of a network are on labelled images, and what they cost."""
