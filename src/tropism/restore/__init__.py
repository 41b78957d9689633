"""What only super-resolution needs: agreement of scores with people, and the form that asks them."""
