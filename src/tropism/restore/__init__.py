"""For super-resolution: pictures made worse, read and paired; judges of invented detail; people asked, agreement; colours kept."""
