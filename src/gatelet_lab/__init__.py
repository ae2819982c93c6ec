"""The command line of gatelet: the paper's table, training, conversion, diagnosis and benchmarks."""
