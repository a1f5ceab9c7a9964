"""Runs that are killed, and what becomes of them."""
