"""How a step is taken and a run kept alive. Knows nothing of stages: what is minimised arrives as an objective."""
