"""Reference of the n-gram cache."""
