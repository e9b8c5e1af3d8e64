"""Kernels: C code compiled for every instruction set; the variant for the processor is chosen at run time.

In come C files, compiled when the package is installed or for a wheel; out come functions for ctypes. Without a
compiled library there are none, and callers use torch's operations.
"""
