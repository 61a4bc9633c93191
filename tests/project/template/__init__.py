"""An operation to copy, a file each: where its pieces go is in CONTRIBUTING.md, "Adding an operation"."""
