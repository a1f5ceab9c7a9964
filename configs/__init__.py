"""The Hydra tree of run configurations, read as `pkg://dynmoe_configs`; one folder per group, one file per option."""
