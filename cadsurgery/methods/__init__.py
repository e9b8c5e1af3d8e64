"""Methods: the sibling surgeries, each in one module or folder, on the same elements, masks and networks.

In comes a network, out goes one that computes less where less is enough in another way than by downsampling. None is
here yet: anytime prediction, sampling with interpolation and non-uniform input sampling will be.
"""
