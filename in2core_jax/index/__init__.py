"""Rows of a few numbers for each example of a large pool: their basis, their store, and rules of selection on them."""
