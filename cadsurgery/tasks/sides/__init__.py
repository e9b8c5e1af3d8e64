"""Kinds of sides that `eval` and `bench` compare, one module each."""
