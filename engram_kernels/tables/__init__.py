"""``EngramTable``: rows in a format and a placement, loaded, saved, staged and trained."""
