"""What the experiments on environments share: worlds by name, runs of many seeds, pictures."""
