"""dg-eval: measures how near a file comes to another, how often it does a task right, and what settings cost."""
