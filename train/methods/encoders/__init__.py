"""Methods that are trained once, and then only encode a person."""
