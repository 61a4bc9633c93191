"""Reference of state by slot."""
