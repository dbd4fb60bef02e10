"""Infilling: holes of a text filled, and parts of a text rewritten."""
