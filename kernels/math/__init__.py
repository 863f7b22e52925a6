"""Computations and pattern semantics shared by two or more backends; files are named by computation."""
