"""Raw text to token shards on Ray Data; knows nothing of models."""
