"""Fills holes in a text, and rewrites passages of it."""
