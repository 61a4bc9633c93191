"""Rows of a table that are replaced in place: for a while, for good, or as another table's rows change."""
