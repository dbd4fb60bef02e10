"""Wraps the C library: owners of its objects, arrays that it fills, its tables of formats and metadata keys."""
