"""Surgery: from a network to the graph of the adaptive one.

In comes an `nn.Module` and an example; out go facts, a plan that says for every operation what happens to it and why,
the rewritten graph, and the laws it was verified by. It knows nothing of masks: a lattice comes from outside.
"""
