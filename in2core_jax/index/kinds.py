"""Kinds of basis: settings need their names, and shall not wait for SciPy."""

KINDS = ("queries", "generic")
NONZEROS = 4  # of a generic projection, for each of the W numbers
