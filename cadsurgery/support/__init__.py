"""Support: general services that know nothing of networks.

Takes paths, names and values from outside. Provides errors that say what to do, files written atomically, measurements
of time and memory, the processes of a launch and the provenance of a result. Most of the modules do not need torch.
"""
