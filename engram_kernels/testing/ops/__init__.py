"""The cases, a file for each op, and what a case is."""
