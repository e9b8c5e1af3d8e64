"""Backends: implementations of the operations on elements, on the CPU in C and oneDNN, on the GPU in Triton."""
