"""What a run did, as one HTML page: curves, samples, settings and facts; several runs compared."""
