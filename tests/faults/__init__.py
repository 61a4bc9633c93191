"""Files, folders and shared memory as strangers and accidents leave them: a clear error, and nothing lost."""
