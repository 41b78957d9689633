"""What only super-resolution needs."""
