"""dg-serve: a server with OpenAI's API."""
