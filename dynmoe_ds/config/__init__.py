"""The configuration of a run: schema, Hydra loading, strict building, validation, translation to DeepSpeed's JSON."""
