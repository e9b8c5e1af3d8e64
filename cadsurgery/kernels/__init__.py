"""Kernels: C code compiled for every instruction set; the variant for the processor is chosen at run time.

In come C files, compiled in the wheel or once by a compiler of this machine; out come functions for ctypes. Without a
compiled library there are none, and callers use torch's operations.
"""
