"""Engines and trackers behind optional extras; nothing here is imported by the rest of the package."""
