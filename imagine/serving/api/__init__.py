"""The HTTP API. It only reads and writes the store: no route runs a model."""
