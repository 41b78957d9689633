"""What only restoration needs: making low-resolution pictures, reading and pairing files, and pictures larger than memory."""
