"""The segrpc server and its models."""
