"""Reference of row optimizers."""
