"""Fills holes of a text, and rewrites parts of it."""
