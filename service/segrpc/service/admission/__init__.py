"""How much of everything callers may take, and who has how much of it. Knows nothing of gRPC."""
