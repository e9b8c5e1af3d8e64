"""Support: general services that know nothing of networks.

In come paths, names and values from outside; out come errors that say what to do, files written atomically,
measurements of time and memory, the processes of a launch and the provenance of a result. Most modules need no torch.
"""
