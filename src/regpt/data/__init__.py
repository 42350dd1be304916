"""Text to token shards to batches: sources -> documents -> prepare -> shards -> loader."""
