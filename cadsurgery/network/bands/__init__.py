"""A large picture in a fixed memory: the maps of a network are computed in bands of rows, with the same result.

`walk.py` decides from the sizes of maps which rows are computed when, and what that takes; `steps.py` and
`element_steps.py` say for each operation which rows it reads and compute them; `reading.py` makes the steps of a graph;
`banded_call.py` carries them out.
"""
