"""The diffusers pipeline that turns a reference and a prompt into a picture, and its sampling code."""
