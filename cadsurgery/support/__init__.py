"""Support: what any program needs and nothing that is about networks.

In come paths, names and values from outside; out go errors that say what to do, files that are whole, times, memory,
the processes of a launch and the provenance of a result. Import its modules: most of them need no torch.
"""
