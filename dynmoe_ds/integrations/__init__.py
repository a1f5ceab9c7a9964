"""Other frameworks on this machine: one file each, imported only when asked for."""
