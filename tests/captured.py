"""A module whose number losses read: tests/test_captures.py."""

LAM = 1.0
