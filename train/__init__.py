"""Training with Lightning: modules, data, the command line."""
