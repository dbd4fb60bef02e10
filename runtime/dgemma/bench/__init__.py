"""dg-bench: times the parts of a denoising step and compares them with the machine's limits."""
