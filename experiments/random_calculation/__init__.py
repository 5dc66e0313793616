"""The parts of the RandomCalculation experiments: configuration, construction, run, report."""
