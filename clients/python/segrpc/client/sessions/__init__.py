"""Interactive sessions: edits go out over one stream, masks come back, and a broken connection loses nothing."""
