"""The SAM 2 and SAM 2.1 models."""
