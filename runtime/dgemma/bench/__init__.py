"""What dg-bench measures: the parts of a denoising step beside the machine's limits, on real or synthetic models."""
