"""Finds models on the Hugging Face Hub, fetches them, and keeps them in its cache."""
