"""Network: what a user holds.

In come a network and a mask; out comes an `AdaptiveModel` that is called as the network was, counted, optimised,
compiled, read at points, and saved to a file and loaded again.
"""
