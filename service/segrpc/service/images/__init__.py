"""Images: from any allowed source to RGB pixels."""
