"""Open public bases and adapters by name, from a folder or from the hub, ready to draw the person of a photo."""
