"""A run on disk: its folder, what was judged, and how its work is divided among processes."""
