"""Read, load and write standard IP-Adapter files."""
