"""lm-evaluation-harness: models of this package under its tasks (extra `eval`)."""
