"""Reads and writes files: GGUF files, JSON lines, logs of lines, and files that only appear once they are complete."""
