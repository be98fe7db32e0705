"""Detectors with routing attention, what they find and follow, and which annotations to trust."""
