"""Sparse deltas of weights: taken, stored, added up."""
