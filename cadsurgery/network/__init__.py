"""Network: the adaptive network, the object that users work with.

In come a network and a mask; out comes an `AdaptiveModel`. It is called like the network, and can be optimised,
compiled, exported, read at points, saved and loaded; its multiply-accumulates can be counted.
"""
