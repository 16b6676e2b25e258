"""What the service remembers between calls of one caller."""
