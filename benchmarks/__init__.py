"""Committed benchmarks: every speed claim of the project is a ratio that one of these prints."""
