"""What only super-resolution needs: judges of invented detail, and what they are asked."""
