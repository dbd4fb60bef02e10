"""Recordings of a canvas: what is recorded, and a writer for each kind of file."""
