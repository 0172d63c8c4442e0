"""The learner: one task after another, in the order in which things happen."""
