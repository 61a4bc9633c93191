"""PTX of one instruction or a few, and what the manual says of it, in exact numbers."""
