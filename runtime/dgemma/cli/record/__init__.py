"""Recordings of a canvas: the pages of a recording, and a writer for each kind of file."""
