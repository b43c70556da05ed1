"""The text-to-image bases that the methods run on, behind one interface."""
