"""From encoded files to RGB pixels."""
