"""Surgery: turn the graph of a network into the graph of its adaptive version.

In come an `nn.Module` and an example; out come facts about the graph, a plan with an action and a reason for every
operation, the rewritten graph, and its verification. Surgery knows nothing of masks: the caller passes a lattice.
"""
