"""Data sources, and what running a model over them teaches: histograms, ranges, the calibration table."""
