"""Kinds of basis: settings need their names, and shall not wait for SciPy."""

KINDS = ("queries", "generic")
