"""What results mean: statistics, values, in NumPy alone."""
