"""What scoring invented detail leaves for a person: pages of scores with the worst pictures, and of agreement with people."""
