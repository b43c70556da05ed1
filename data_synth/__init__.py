"""The data builder: people, contexts and captions become pictures and pairs on disk. It never imports `train`."""
