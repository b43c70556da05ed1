"""The public bases that the identity adapter is trained on: how each is opened, encoded, noised and computed."""
