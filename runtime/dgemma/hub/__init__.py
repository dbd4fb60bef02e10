"""Finds models on the Hugging Face Hub, downloads them, and keeps them in the Hub's cache."""
