"""The memory of tables: pages, registration, sharing between processes, mapped files."""
