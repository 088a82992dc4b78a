"""Activations and codes on disk and in memory: stores, matrix files, the order of rows, reading ahead."""
