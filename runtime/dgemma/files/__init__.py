"""Files: GGUF files, files that appear when they are complete, JSON lines, and logs of lines."""
