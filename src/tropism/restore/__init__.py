"""What only restoration needs: low-resolution pictures made, files read and paired, tiles, judges of invented detail."""
