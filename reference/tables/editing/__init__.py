"""Rows of a table that are replaced in place."""
