"""Metrics: one matrix and many numbers, other people's names for them, and the geometry of weight updates."""
