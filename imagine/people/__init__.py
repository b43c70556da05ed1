"""From a photo to a face crop to a persona."""
