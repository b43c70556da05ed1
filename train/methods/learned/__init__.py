"""What a method can learn: words, additions to weights, and how they are saved."""
