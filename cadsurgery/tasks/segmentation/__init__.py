"""Segmentation: accuracy of a network's classes on labelled images, and fidelity without labels."""
