"""`dynmoe <verb>`: one file per verb, each light to import so that `--help` answers at once."""
