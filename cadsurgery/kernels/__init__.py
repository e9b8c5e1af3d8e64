"""Kernels: C code compiled for every instruction set; the variant for the processor is chosen at run time.

A wheel contains the compiled library; otherwise a C compiler of this machine builds it once. It provides functions for
ctypes. Without a compiled library, callers use torch's operations.
"""
