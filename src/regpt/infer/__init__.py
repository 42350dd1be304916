"""Text from a trained model: the cache of keys and values, the choice of a token, the engine around both."""
