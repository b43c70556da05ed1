"""Methods that are trained for each person."""
