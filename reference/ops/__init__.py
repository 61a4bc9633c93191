"""References of the ops."""
