"""Other methods of personalisation, as baselines: each says what it learns, over one training loop."""
