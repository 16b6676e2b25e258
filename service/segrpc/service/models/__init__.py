"""Models and how they are found."""
