"""The data builder: write pictures of the portrait world, and pairs of pictures, to disk. It never imports `train`."""
