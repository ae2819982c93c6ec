"""The command line of gatelet: reproduces the paper's table."""
