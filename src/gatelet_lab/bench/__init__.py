"""What `gatelet bench` measures."""
