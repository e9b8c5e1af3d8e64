"""Choices that hold in every command and function where the user makes none. Nothing here imports torch."""

DEFAULT_MASK = "edges"
