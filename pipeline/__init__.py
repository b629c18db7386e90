"""documents -> collection: read, chunk, embed and index."""
