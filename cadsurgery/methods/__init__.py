"""Methods: the sibling surgeries, each in a folder, on the same elements, masks and networks.

In comes a network, out goes one that computes less where less is enough in another way than by downsampling. `anytime`
adds exits and leaves out what they are confident of; `sampling` puts gates into residual branches and interpolates;
`resampling` samples the image before the network, more densely where it matters; `storage` saves and loads whatever a
method made.
"""
