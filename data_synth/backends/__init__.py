"""The models that the steps of a build call: the interfaces, and the backends that implement them."""
