"""The hot n-gram cache: rows that are asked for often, in device memory."""
