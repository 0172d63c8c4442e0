"""The run directory: a task is a commit, and a result is read from commits."""
