"""What computes the products."""
