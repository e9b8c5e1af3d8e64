"""Tasks: what the commands do with networks, files and folders, also for callers from Python.

In come names, paths and options; out go reports that can be printed, written as JSON and drawn. There are tasks for
conversion, benchmarks, the evaluation of segmentation and keypoints, and the check of a library's networks.
"""
