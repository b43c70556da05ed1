"""The diffusers pipeline that generates a picture from a reference and a prompt, and its sampling code."""
