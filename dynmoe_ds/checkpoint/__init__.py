"""Training on disk: every expert by its id, with masters and moments, so that any layout can go on with it."""
