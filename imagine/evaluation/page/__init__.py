"""The report as one HTML page, which needs no other file."""
