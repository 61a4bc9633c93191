"""Reference of row gradients."""
