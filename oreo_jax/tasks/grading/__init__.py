"""Grading of final answers: cutting out, comparing, worker processes."""
