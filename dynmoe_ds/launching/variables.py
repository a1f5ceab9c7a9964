"""Environment variables by which whoever starts ranks and the ranks talk. Light: no torch, no Hydra."""

from __future__ import annotations

STOP_FILE_VARIABLE = "DYNMOE_STOP_FILE"
"""A file whose appearance asks the ranks for a checkpoint and an end: signals do not travel between hosts."""

EXIT_NOTE_VARIABLE = "DYNMOE_EXIT_NOTE"
"""The file in which a rank that leaves in order notes its exit code: launchers change it."""
