"""What every room uses: errors, measurements, progress, the environment, validation, files."""
