"""How long a test waits for another process. No result depends on it: it ends what hangs, on the busiest machine."""

HANG = 1800  # seconds
#: Of a group in which a rank is meant to hang: what the others wait, and longer than any step of theirs takes.
TIMEOUT = 12.0
