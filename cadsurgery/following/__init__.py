"""Following Python: find what a network's forward computes, as a graph whose nodes are known.

In come an `nn.Module` and the arguments of a call; out comes the graph that torch.fx records, with shapes and
multiply-accumulates of every node, guards for the branches that Python took, and what the forward reads or keeps beside
its arguments. `read` is the way in. Nothing here knows what an operation means for the positions of a map.
"""
