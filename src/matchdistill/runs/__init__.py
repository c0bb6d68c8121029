"""Runs: what they are made of, where they lie, and how they go."""
