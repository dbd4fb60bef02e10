"""Models of the Hugging Face Hub: their names, their place in the cache, their download."""
