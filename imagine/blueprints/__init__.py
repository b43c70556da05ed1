"""What a base consists of: the classes and the configurations of its networks, without their weights."""
