"""Methods: the sibling surgeries, each in one module or folder, on the same elements, masks and networks.

In comes a network, out goes one that computes less where less is enough in another way than by downsampling. `anytime`
adds exits and leaves out what they are confident of; `storage` saves and loads whatever a method made. Sampling with
interpolation and non-uniform input sampling will be here.
"""
