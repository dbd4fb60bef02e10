"""dg-serve: an OpenAI-compatible server."""
