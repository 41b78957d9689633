"""What only super-resolution needs: pictures made worse, read and paired; judges of invented detail; people asked, and agreement."""
