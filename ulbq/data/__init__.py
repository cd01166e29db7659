"""Text and tokens: named data sets, a user's own files, seeded calibration samples."""
