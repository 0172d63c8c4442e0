"""What one does with runs: compare, plan, gate, diff, tune the scale."""
