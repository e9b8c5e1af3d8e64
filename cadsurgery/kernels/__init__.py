"""Kernels: compiled C code for every instruction set, of which the processor's is chosen when the program runs.

In come C files, which a wheel brings compiled or a compiler here compiles once; out come functions for ctypes. Without
a compiled library there are none, and callers use torch's operations.
"""
