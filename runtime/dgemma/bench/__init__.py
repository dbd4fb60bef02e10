"""dg-bench times the parts of a step and compares them with the machine's limits; plans predict a step on a machine."""
