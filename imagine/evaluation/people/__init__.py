"""The suite `people`: pictures of two and three held-out people of the portrait world."""
