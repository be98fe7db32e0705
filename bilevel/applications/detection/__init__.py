"""Detectors with bi-level routing attention, and learning which annotations to trust."""
