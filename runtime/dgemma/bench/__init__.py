"""dg-bench: times the parts of a step, compares them with the machine's limits, and predicts steps (plans)."""
