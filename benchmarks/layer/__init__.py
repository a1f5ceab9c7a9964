"""The layer beside its peers."""
