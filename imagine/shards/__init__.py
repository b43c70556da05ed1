"""Index, read and write image records on disk: webdataset shards and folders of pictures."""
