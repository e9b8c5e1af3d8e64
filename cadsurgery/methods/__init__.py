"""Methods: other ways to make a network compute less, built on the same elements, masks and networks.

In comes a network; out comes a network that computes less. `anytime` adds exits and skips positions at which an exit
is confident. `sampling` adds gates to residual branches and interpolates between computed positions. `resampling`
samples the image more densely where it matters, before the network. `method_files` saves and loads the networks of all
methods.
"""
