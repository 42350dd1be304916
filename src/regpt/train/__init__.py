"""Training: the plan, the loop, and everything that keeps its work safe."""
