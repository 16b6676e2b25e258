"""Running models: the engine protocol and its implementations."""
