"""dg-eval: measures how close a file is to another one, how many tasks it solves, and what settings cost."""
