"""Precomputed training inputs on disk: pictures, latents, face crops, caption tokens and text states."""
