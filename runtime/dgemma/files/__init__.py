"""Reads and writes files: GGUF files, JSON lines, logs of lines, and files that appear when they are complete."""
