"""Surgery: turn the graph of a network into the graph of its adaptive version.

In come the facts about a network's graph; out come a plan with an action and a reason for every
operation, the rewritten graph, and its verification. Surgery knows nothing of masks: the caller passes a lattice.
"""
